"""The loop with Lightning Fabric, after its documentation."""

import os
from typing import Any

from lightning_fabric import Fabric
from torch.utils.data import DataLoader

from bench.peers import common


def main() -> None:
    """Train until the data or whoever measures ends it."""
    job = common.arguments()
    fabric = Fabric(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy="ddp",
        precision="bf16-mixed" if job.precision == "bf16" else "32-true",
    )
    fabric.launch()
    llama = common.llama()
    model, optimizer = fabric.setup(llama, common.adamw(llama.parameters()))
    windows = DataLoader(common.Windows(job.windows), job.batch, shuffle=True, drop_last=True)
    loader: Any = fabric.setup_dataloaders(windows)
    record = common.Record(job.metrics)
    for batch in loader:
        loss = model(**batch).loss
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        record.step()


if __name__ == "__main__":
    main()
