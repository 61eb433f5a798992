"""Buckets hang on the hooks of the parameters: these must neither keep them nor need them."""

import gc
import weakref

import torch
from torch import nn

from shoal.tensors.buckets import Buckets
from shoal.tensors.piece import whole


def test_buckets_go_with_their_last_owner_and_leave_a_model_that_trains() -> None:
    model = nn.Linear(3, 2)
    buckets = Buckets(whole(model), bucket_bytes=8)
    heard: list[object] = []
    buckets.on_complete = heard.append
    buckets.begin(0, first=True, last=True)
    model(torch.ones(1, 3)).sum().backward()
    assert len(heard) == len(buckets.all)
    freed, freed_model = weakref.ref(buckets), weakref.ref(model)
    heard.clear()
    del buckets
    gc.collect()
    assert freed() is None
    model(torch.ones(1, 3)).sum().backward()
    assert heard == []
    del model
    gc.collect()
    assert freed_model() is None
