"""A loop of one's own, as a program: `python session_loop.py FOLDER STOP_AFTER SETTINGS...`, under any launcher."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

import shoal

STEPS, MICRO_BATCHES = 6, 4


def main(folder: str, stop_after: int, settings: dict) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 2)).double()
    with shoal.Session(MICRO_BATCHES, **settings) as session:
        model, _ = session.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        session.load(folder)
        losses = []
        for step in range(session.steps_done, stop_after):
            for v in session.share():
                rows = 1 + (step + v) % 3  # micro-batches of unequal size
                draw = torch.Generator().manual_seed(100 * step + v)
                x = torch.randn(rows, 8, generator=draw, dtype=torch.float64)
                scores = model(x)
                session.backward(
                    nn.functional.cross_entropy(scores, (x[:, 0] > 0).long(), reduction="sum"), rows
                )
            losses.append(session.step())
        session.save(folder)
        if session.rank == 0:
            Path(folder, "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
