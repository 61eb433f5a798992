"""Causal language models from a preset, a Hugging Face folder or the hub: their loss and their export."""

from transformers import utils
from transformers.utils import import_utils


def _no() -> bool:
    return False


# Transformers imports torchao, if it is installed, for a quantizer of its own that shoal does not use: seconds of
# every start, and lines about what it was not built for.
utils.is_torchao_available = import_utils.is_torchao_available = _no
