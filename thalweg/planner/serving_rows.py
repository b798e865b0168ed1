"""Published serving figures as cases: what was run, what the planner predicts of it, what it does not claim and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from thalweg.config.model_parse import load_model_config
from thalweg.errors import ConfigError
from thalweg.planner.baselines import constant_figure, roofline_tables
from thalweg.planner.cost import Estimate, Origin
from thalweg.planner.hardware import accelerator
from thalweg.planner.layout import Deployment, ParallelLayout, Speculation
from thalweg.planner.memory_model import ENGINES, plan_memory
from thalweg.planner.serving import Serving
from thalweg.planner.step_cost import ModelStepCost
from thalweg.planner.tables import Row, read_rows

LONG_PROMPT = 65536  # tokens: below, the host's share and the sources' own scatter exceed what is computed
MOST_CONCURRENT = 16  # above, batches depend on queues and pools: a simulation's matter
CHUNK_TOKENS = 8192
POOL_SEQUENCE = 1048576  # tokens of V4's longest sequence: vLLM reports its pool in sequences of max_model_len
QUANTS = {"fp4": "mxfp4", "fp4/fp8": "mxfp4", "": "mxfp4", "fp8": "fp8", "nvfp4": "nvfp4"}
FRAMEWORKS = ("sglang", "vllm")
_NOT_MODELLED = {
    "disagg": "prefill and decode on separate GPUs in an unstated ratio",
    "lmcache": "traces with an unstated reuse",
    "megamoe": "the MegaMoE kernel has no rows of this shape",
    "dspark": "DSpark's drafts have no rows",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One measured figure beside the planner's. `estimate` None: not computable; `reason`: why it is not claimed."""

    quantity: str
    where: str
    load: str  # what of `where` is not a choice of the one who serves
    unit: str
    measured: float
    estimate: Estimate | None
    reason: str = ""
    baselines: Mapping[str, float] = field(default_factory=dict)

    @property
    def claimed(self) -> bool:
        return not self.reason and self.estimate is not None


@dataclass(frozen=True, slots=True)
class Case:
    """What a row ran."""

    model: str
    deployment: Deployment
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    utilization: float
    outdated: bool  # an engine older than the tables' rows of it
    acceptance_stated: bool


@cache
def acceptance(drafts: int, thinking: bool = False) -> float:
    """Mean tokens per step of MTP with so many drafts, as measured (InferenceX golden acceptance, V4-Pro, coding)."""
    known = {}
    for row in read_rows("v4_measured_serving.csv"):
        count = re.search(r"num_speculative_tokens=(\d+)", row["config"])
        length = re.search(rf"thinking_{'on' if thinking else 'off'} ([\d.]+)", row["note"])
        if count and length:
            known[int(count[1])] = float(length[1])
    if drafts not in known:
        raise ConfigError(f"drafts: acceptance is known of {sorted(known)}, not of {drafts}", param="drafts")
    return known[drafts]


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """Every figure of serving rows beside the planner's."""
    found = []
    for row in rows:
        found += _compare_row(row)
    return found


def _load(row: Row) -> str:
    return f"{row['hw']} {row['model']} {row['isl']}/{row['osl']} c={row['concurrency']}"


def _where(row: Row) -> str:
    return " ".join(f"{_load(row)} {row['quant']} {row['engine']} {row['config']}".split())


def _figures(row: Row) -> dict[str, tuple[float, str]]:
    """Measured figures of a row by quantity, in seconds or tokens."""
    figures = {}
    for quantity, column in (("ttft", "ttft_ms"), ("tpot", "tpot_ms")):
        if row[column]:
            figures[quantity] = float(row[column]) * 1e-3, "s"
    if found := re.search(r"makespan ([\d.]+) s", row["note"]):
        figures["makespan"] = float(found[1]), "s"
    if found := re.search(r"KV (?:\d+ x )?(\d{6,}) tokens", row["note"]):
        figures["capacity"] = float(found[1]), "tokens"
    return figures


def _compare_row(row: Row) -> list[Comparison]:
    figures = _figures(row)
    if not figures:
        return []
    try:
        case = read_case(row)
    except ConfigError as error:
        return [
            Comparison(q, _where(row), _load(row), unit, value, None, error.message)
            for q, (value, unit) in figures.items()
        ]
    found = []
    for quantity, (value, unit) in figures.items():
        try:
            estimate = predict(case, quantity)
            reason, baselines = _unclaimed(case, quantity), _baselines(case, quantity)
        except ConfigError as error:
            estimate, reason, baselines = None, error.message, {}
        found.append(Comparison(quantity, _where(row), _load(row), unit, value, estimate, reason, baselines))
    return found


def read_case(row: Row) -> Case:
    """The case of a row. Raises ConfigError saying what is unknown or not modelled."""
    text = f"{row['engine']} {row['config']}".lower()
    accelerator(row["hw"])
    for word, reason in _NOT_MODELLED.items():
        if word in text:
            raise ConfigError(reason, param="config")
    if re.search(r"\b(hits?|reuse|warm|cached)\b", f"{text} {row['note']}".lower()):
        raise ConfigError("part of the prompts is reused, how much is said in words only", param="note")
    framework = row["engine"].split()[0].lower() if row["engine"] else ""
    if framework not in FRAMEWORKS:
        raise ConfigError(f"engine {row['engine']!r} has no rows", param="engine")
    model = next((name for name in ("flash", "pro") if name in row["model"].lower()), None)
    if model is None or row["quant"] not in QUANTS:
        raise ConfigError(f"model {row['model']!r} in {row['quant']!r} is not known", param="model")
    stated = _stated_acceptance(row["note"])
    deployment = Deployment(
        framework,
        accelerator(row["hw"]).name,
        _layout(text),
        QUANTS[row["quant"]],
        _number(r"chunk (\d+)", row["source"], CHUNK_TOKENS),
        _speculation(text, stated),
    )
    sizes = (int(float(row[name] or 0)) for name in ("isl", "osl", "concurrency"))
    prompt, output, concurrency = sizes
    utilization = float(found[1]) if (found := re.search(r"util ([\d.]+)", row["source"])) else 0.9
    outdated = _version(row["engine"]) < _version(f"{framework} {_table_version(framework)}")
    return Case(model, deployment, prompt, output, concurrency, utilization, outdated, stated is not None)


def _version(engine: str) -> tuple[int, ...]:
    """`sglang 0.5.15` to (0, 5, 15); without a number, () is older than all."""
    found = re.search(r"\d+(?:\.\d+)+", engine)
    return tuple(int(n) for n in found[0].split(".")) if found else ()


@cache
def _table_version(framework: str) -> str:
    return next(row["version"] for row in read_rows("v4_kernel_times.csv") if row["framework"] == framework)


def _number(pattern: str, text: str, otherwise: int) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else otherwise


def _layout(text: str) -> ParallelLayout:
    tp, dp = _number(r"\btp(\d+)", text, 0), _number(r"\bdp(\d+)", text, 0)
    if not tp and not dp:
        raise ConfigError("the layout is not stated", param="config")
    expert_parallel = bool(re.search(r"\bep\d*\b|deepep", text))
    if tp and dp:  # SGLang: `dp` ranks of attention within the `tp` GPUs
        return ParallelLayout(tp // dp or 1, dp, 1, expert_parallel, "deepep_ll" if "deepep" in text else "gather")
    return ParallelLayout(tp or 1, dp or 1, 1, expert_parallel)


def _stated_acceptance(note: str) -> float | None:
    """Tokens per step that a row states beside its times."""
    found = re.search(r"acceptance .*length ([\d.]+)", note)
    return float(found[1]) if found else None


def _speculation(text: str, stated: float | None) -> Speculation | None:
    eagle = re.search(r"eagle (\d)-\d-\d", text)
    mtp = re.search(r"mtp ?(\d)", text)
    drafts = int((eagle or mtp or ["", "0"])[1])
    if not drafts:
        return None
    return Speculation(drafts, acceptance(drafts) if stated is None else stated)


@cache
def _serving(model: str, deployment: Deployment) -> Serving:
    return Serving(ModelStepCost(load_model_config(model), deployment))


@cache
def _roofline(model: str, deployment: Deployment) -> Serving:
    return Serving(ModelStepCost(load_model_config(model), deployment, roofline_tables()))


def _baselines(case: Case, quantity: str) -> dict[str, float]:
    """What limits of the hardware alone, and a constant rate, say of a quantity."""
    if quantity == "capacity":
        return {}
    serving = _serving(case.model, case.deployment)
    return {
        "roofline": predict(case, quantity, _roofline(case.model, case.deployment)).seconds,
        "constant rate": constant_figure(serving, quantity, case.concurrency, case.prompt_tokens),
    }


def predict(case: Case, quantity: str, serving: Serving | None = None) -> Estimate:
    """The planner's figure of a quantity: seconds, or tokens of capacity."""
    if quantity == "capacity":
        plan = plan_memory(load_model_config(case.model), case.deployment, utilization=case.utilization)
        tokens = plan.tokens(POOL_SEQUENCE)
        return Estimate(tokens, 0.95 * tokens, 1.05 * tokens, Origin.EXTRAPOLATED)
    serving = serving or _serving(case.model, case.deployment)
    if not case.prompt_tokens or not case.concurrency:
        raise ConfigError("prompt length or concurrency is not stated", param="rows")
    if quantity == "ttft":
        return serving.queued_ttft(case.concurrency, case.prompt_tokens)
    if quantity == "makespan":
        return serving.makespan(case.concurrency, case.prompt_tokens)
    estimate = serving.tpot(case.concurrency, case.prompt_tokens, max(1, case.output_tokens))
    speculation = case.deployment.speculation
    if speculation is None or case.acceptance_stated:
        return estimate
    least = acceptance(speculation.drafts, thinking=True)  # of the task nothing is known: thinking accepts fewer
    return replace(estimate, high=estimate.high * speculation.accepted / least)


def _unclaimed(case: Case, quantity: str) -> str:
    """Why a figure that can be computed is not claimed; empty if it is."""
    dp = case.deployment.layout.dp
    if quantity == "capacity":
        return "" if case.deployment.framework in ENGINES else "page geometry not known"
    if case.outdated:
        return "an engine older than the tables' rows of it"
    if quantity == "tpot" and dp > 1:
        return "ranks of data parallel attention wait for each other's prompts: not closed-form"
    if case.concurrency > MOST_CONCURRENT:
        return f"more than {MOST_CONCURRENT} in flight: batches depend on queues and pools"
    if quantity == "ttft" and case.prompt_tokens < LONG_PROMPT:
        return f"prompts under {LONG_PROMPT:,} tokens: host time and the sources' scatter (up to 48%) decide"
    if quantity == "makespan" and dp > 1 and case.concurrency > 1:
        return "depends on the router's balance over ranks"
    return ""
