"""An engine in bfloat16 on Triton's kernels, interpreted, from a checkpoint to its tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.checkpoint.files import write
from tests.engine.assembly import Outcome, submit
from tests.model.test_triton import SMALL
from thalweg.config.model_parse import default_model, load_model_config
from thalweg.config.options import EngineOptions
from thalweg.engine.runtime import build_runtime

PROMPT = [5, 17, 40, 8]


def test_a_request_on_triton_kernels_alone_and_in_company(tmp_path: Path) -> None:
    """Its tokens are the same, and the start-up table says what computes."""
    model = write(tmp_path / "model", {**SMALL, "vocab_size": load_model_config(default_model()).vocab_size})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(default_model() / name, model / name)
    options = EngineOptions(
        model=str(model), device="cpu", kernels="triton", dtype="bfloat16", kv_cache_memory=2**24, max_num_seqs=2,
        kv_host_memory=0,
    )  # fmt: skip
    runtime = build_runtime(options)
    shown = {choice.what: choice.value for choice in runtime.choices}
    assert (shown["dtype"], shown["kv cache dtype"], shown["warm-up"]) == ("bfloat16", "bfloat16", "none")
    engine = runtime.engine
    engine.start()
    try:
        alone = ended([submit(engine, "alone", PROMPT, max_tokens=2, cache_salt="1")])
        together = ended(
            [
                submit(engine, "same", PROMPT, max_tokens=2, cache_salt="2"),
                submit(engine, "other", PROMPT[::-1], max_tokens=2, temperature=1.0, seed=3),
            ]
        )
    finally:
        engine.close()
    assert together[0] == alone[0] and all(len(tokens) == 2 for tokens in (*alone, *together))
    assert runtime.kernel_set.compilations.in_serving == 0


def ended(outcomes: list[Outcome]) -> list[list[int]]:
    assert all(outcome.done.wait(120) for outcome in outcomes)
    return [outcome.tokens for outcome in outcomes]
