"""The loop with Hugging Face Accelerate, after its documentation."""

from accelerate import Accelerator
from torch.utils.data import DataLoader

from bench.peers import common


def main() -> None:
    """Train until the data or whoever measures ends it."""
    job = common.arguments()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if job.precision == "bf16" else "no")
    llama = common.llama()
    loader = DataLoader(common.Windows(job.windows), job.batch, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(llama, common.adamw(llama.parameters()), loader)
    record = common.Record(job.metrics)
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        record.step()


if __name__ == "__main__":
    main()
