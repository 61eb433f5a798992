"""Text from a trained model: streamed for one prompt, or data-parallel over a file of prompts."""

from pathlib import Path

from shoal.errors import UserError
from shoal.serve.options import GenerateOptions

__all__ = ["GenerateOptions", "complete", "run"]


def run(options: GenerateOptions) -> None:
    """Stream the completion of `prompt`, or complete every prompt of `prompts_file` into `output_file`.

    The file has one JSON object a prompt, in order (index, prompt, completion), the same for any number of
    workers; the same command goes on after a kill. Raises UserError for what cannot be done.
    """
    _check(options)
    if options.prompt is not None:
        from shoal.serve.writer import Writer

        Writer(options).stream(options.prompt)
        return
    from shoal.serve.blocks import complete_file

    complete_file(options)


def complete(options: GenerateOptions) -> str:
    """What follows the `prompt` of the options, as text. Raises UserError for what cannot be done."""
    _check(options)
    from shoal.serve.writer import Writer

    return Writer(options).complete([options.prompt or ""], 0)[0]


def _check(options: GenerateOptions) -> None:
    if not Path(options.model).is_dir():
        asked = f"shoal generate {options.model}"
        raise UserError(asked, "there is no such folder", "give a run's or a model's folder")
    if (options.prompt is None) == (options.prompts_file is None):
        raise UserError("shoal generate", "not one of --prompt and --prompts-file", "give one of the two")
    if options.prompts_file is not None and options.output_file is None:
        raise UserError("--prompts-file", "no --output-file", "say where completions go")
    for flag, value, least in [
        ("--max-new-tokens", options.max_new_tokens, 1),
        ("--batch-size", options.batch_size, 1),
        ("--nproc-per-node", options.nproc, 1),
        ("--temperature", options.temperature, 0),
        ("--top-k", options.top_k, 0),
    ]:
        if value < least:
            raise UserError(f"{flag} {value}", "too small", f"set at least {least}")
    if options.quantize not in ("none", "int8", "int4"):
        raise UserError(f"--quantize {options.quantize}", "there is no such format", "take int8 or int4")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p {options.top_p}", "not a probability above 0", "set it above 0, at most 1")
