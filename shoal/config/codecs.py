"""The table of codecs: the name of each, and where in `shoal.codecs` the function that makes one is."""

CODECS = {
    "none": "cast.plain",
    "bf16": "cast.bf16",
    "fp16": "cast.fp16",
    "int8": "quantize.int8",
    "int4": "quantize.int4",
    "sign": "sign.sign",
    "topk": "sparse.topk",
    "randomk": "sparse.randomk",
    "powersgd": "powersgd.powersgd",
}
