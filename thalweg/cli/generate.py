"""`thalweg generate`: one answer, in this process, to standard output."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thalweg.cli import engine_flags as flags
from thalweg.errors import RequestError

if TYPE_CHECKING:
    from thalweg.engine.runtime import Runtime
    from thalweg.types import SamplingParams


def generate(
    model: flags.Model = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")] = None,
    file: Annotated[
        str | None, typer.Option("--file", "-f", help="Read the prompt from a file; -: standard input.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Ask as a user message, or continue the text.")] = True,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most output tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler.")] = None,
    config: flags.ConfigFile = None,
    dtype: flags.Dtype = None,
    kv_cache_dtype: flags.KvDtype = None,
    index_cache_dtype: flags.IndexDtype = None,
    quantization_simulation: flags.Simulation = None,
    kernels: flags.KernelBackend = None,
    deterministic: flags.Deterministic = None,
    max_model_len: flags.MaxLen = None,
    max_num_batched_tokens: flags.StepTokens = None,
    kv_cache_memory: flags.CacheMemory = None,
    memory_utilization: flags.Utilization = None,
    threads: flags.Threads = None,
) -> None:
    """Run a model on one prompt and stream the answer."""
    text = _prompt(prompt, file)
    options = flags.options_from(locals())
    from thalweg.cli.progress import start_progress
    from thalweg.engine.runtime import build_runtime
    from thalweg.types import SamplingParams

    with start_progress() as progress:
        runtime = build_runtime(options, progress)
    runtime.engine.start()
    try:
        sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
        asyncio.run(_stream(runtime, text, chat, sampling))
    finally:
        runtime.engine.close()


def _prompt(prompt: str | None, file: str | None) -> str:
    if (prompt is None) == (file is None):
        raise RequestError("give the prompt with either --prompt or --file", param="prompt")
    if prompt is not None:
        return prompt
    try:
        return sys.stdin.read() if file == "-" else Path(file or "").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--file {file}: {error}", param="file") from error


async def _stream(runtime: Runtime, text: str, chat: bool, sampling: SamplingParams) -> None:
    import numpy as np

    from thalweg.cli.progress import bar
    from thalweg.server.chat import encode_conversation
    from thalweg.server.generation import PlainReader
    from thalweg.server.schemas import ChatBody
    from thalweg.server.service import Prompt, Service

    service = Service(runtime)
    if chat:
        encoded = await encode_conversation(service, ChatBody(messages=[{"role": "user", "content": text}]))
        prompt = Prompt(np.array(encoded.token_ids, np.int32), encoded.boundaries)
    else:
        prompt = service.prompt_of_ids(service.encode_plain(text))
    generation = service.start(prompt, sampling, PlainReader(runtime.tokenizer), request_id="generate")
    async with aclosing(generation.pieces()) as pieces:
        with bar() as progress:
            task = progress.add_task("reading the prompt", total=len(prompt.tokens))
            first = await anext(pieces)
            while first.progress is not None:
                progress.update(task, completed=first.progress.done_tokens)
                first = await anext(pieces)
        sys.stdout.write(first.text)
        async for piece in pieces:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
