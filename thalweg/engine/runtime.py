"""From options to a running engine: every choice is made here, once, and each has a reason that start-up prints."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from math import inf
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from thalweg.cache.coordinator import Coordinator
from thalweg.cache.geometry import CacheGroupSpec, cache_groups
from thalweg.cache.policy import CheckpointPolicy, policy_of
from thalweg.cache.prefix_index import Namespace
from thalweg.checkpoint.loader import kept_forms, load_parameters
from thalweg.checkpoint.parameters import parameters
from thalweg.checkpoint.reader import Checkpoint, fingerprint, open_checkpoint
from thalweg.config.model import LayerKind, ModelConfig
from thalweg.config.model_parse import default_model
from thalweg.config.options import EngineOptions
from thalweg.engine.batch import BatchBuilder
from thalweg.engine.budget import MemoryFacts, cache_budget, workspace_bytes
from thalweg.engine.engine import Engine
from thalweg.engine.limits import EngineLimits
from thalweg.engine.plan import StepPlan
from thalweg.engine.request import Sequence
from thalweg.engine.runner import ModelRunner, steps_of
from thalweg.engine.sampler import Sampler
from thalweg.engine.scheduler import Scheduler, SchedulerLimits
from thalweg.engine.shadow import Shadow
from thalweg.engine.tiering import DISK, HOST, Tiering
from thalweg.engine.warmup import WarmUp
from thalweg.errors import ConfigError
from thalweg.kernels.deterministic.linear import varying_shapes
from thalweg.kernels.registry import KernelSet, select_kernels
from thalweg.memory.arena import CacheArena
from thalweg.memory.capacity import CachePlan, plan_cache
from thalweg.memory.disk import DiskTier
from thalweg.memory.host import HostTier
from thalweg.memory.layout import LAYOUT_VERSION, CacheLayout, RowFormat
from thalweg.memory.packing import BlockPacker
from thalweg.memory.tier import Tier
from thalweg.memory.transfers import Transfers
from thalweg.model.graphs import StepLimits
from thalweg.model.numerics import Numerics
from thalweg.model.transformer import Model
from thalweg.model.weights import allocate, weight_bytes
from thalweg.text.tokenizer import Tokenizer
from thalweg.types import GenerateRequest

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SMALL_DECODES = 4  # sequences; what a step of more needs once is little beside its work
_WARM_UP_SECONDS = 1.0  # on a CPU: steps of a model that takes longer gain little
_FLOAT32_SHARE = 0.25  # weights are widened to fp32 on a CPU while they take no more of the memory than this
Progress = Callable[[str, int, int], None]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Choice:
    """One resolved setting and why it has its value."""

    what: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class Runtime:
    """A loaded model and its engine, not started yet."""

    engine: Engine
    tokenizer: Tokenizer
    model_name: str
    model_config: ModelConfig
    max_model_len: int
    chat_encoding: str
    default_thinking: bool
    cache_plan: CachePlan
    kernel_set: KernelSet
    choices: tuple[Choice, ...]
    prefix_caching: bool = True


def model_directory(model: str) -> Path:
    """The directory of a model option: `default` is the embedded one."""
    return default_model() if model == "default" else Path(model)


def build_runtime(options: EngineOptions, progress: Progress = lambda what, done, total: None) -> Runtime:
    """Load the model, lay out the caches and warm up. progress(what, done, total) counts weight tensors, then steps.

    Raises ConfigError or CheckpointError naming the option, file or tensor.
    """
    directory = model_directory(options.model)
    checkpoint = open_checkpoint(directory)
    config = checkpoint.config
    tokenizer = _tokenizer(directory, config)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = _device(options)
    compute = _DTYPES.get(options.dtype, torch.float32)
    kernel_set = select_kernels(device, deterministic=options.deterministic, compute=compute, wanted=options.kernels)
    numerics, choices = _numerics(options, config, device, narrow=torch.bfloat16 in kernel_set.forms)
    kept = kept_forms(checkpoint, kernel_set.forms)
    weights_size = weight_bytes(config, numerics.compute, kept)
    groups, plan = _cache_plan(options, config, numerics, _memory(device), weights_size, choices)
    max_model_len = _max_model_len(options, config, plan, choices)
    weights = allocate(config, numerics.compute, device, kept)
    _in_a_thread_that_ends(lambda: load_parameters(checkpoint, weights, progress=partial(progress, "loading weights")))
    if options.deterministic:
        choices.append(_checked_products(weights, kernel_set))
    model = Model(config, weights, numerics, kernel_set.kernels)
    policy = window_policy(options, config)
    arena = CacheArena(plan, device)
    lower_tiers = _lower_tiers(options, plan, choices)
    packer = BlockPacker(arena)
    limits = SchedulerLimits(options.max_num_seqs, options.max_num_batched_tokens)
    namespace = namespaces(checkpoint, numerics, policy, kernel_set)

    def make_scheduler() -> Scheduler:
        coordinator = Coordinator(groups, plan.pool_blocks, policy, prefix_caching=options.enable_prefix_caching)
        return Scheduler(_tiering(coordinator, lower_tiers(), packer), limits, namespace)

    eos = tuple(dict.fromkeys((*config.eos_token_ids, tokenizer.eos_id)))
    step_limits = StepLimits(options.max_num_seqs, max_model_len)
    steps = steps_of(model, arena, kernel_set, step_limits)
    runner = ModelRunner(steps, arena, BatchBuilder(config, groups), Sampler(eos, kernel_set.kernels.sample))
    choices.append(_warmed_up(runner, WarmUp(config, groups, step_limits), limits, kernel_set, progress))
    engine_limits = EngineLimits(
        max_model_len, plan.token_capacity, config.vocab_size, options.max_waiting, eos, options.max_queue_seconds
    )
    name = options.served_model_name or ("thalweg-tiny" if options.model == "default" else directory.resolve().name)
    return Runtime(
        engine=Engine(make_scheduler, runner, engine_limits, shadow=Shadow(options.shadow_rate, random.random)),
        tokenizer=tokenizer,
        model_name=name,
        model_config=config,
        max_model_len=max_model_len,
        chat_encoding=options.chat_encoding,
        default_thinking=options.model != "default",  # released models think unless told not to; ours cannot
        cache_plan=plan,
        kernel_set=kernel_set,
        choices=tuple(_about(options, checkpoint) + choices),
        prefix_caching=options.enable_prefix_caching,
    )


def _tokenizer(directory: Path, config: ModelConfig) -> Tokenizer:
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {config.vocab_size}",
            param="vocab_size",
        )
    return tokenizer


def window_policy(options: EngineOptions, config: ModelConfig) -> CheckpointPolicy:
    """The policy that the options name, for one model."""
    return policy_of(config, options.window_policy, options.checkpoint_interval)


def _lower_tiers(options: EngineOptions, plan: CachePlan, choices: list[Choice]) -> Callable[[], dict[str, Tier]]:
    """Host and disk tiers as asked for. Raises ConfigError where a directory cannot be used.

    Whoever asks again, after a crash, gets an empty host tier: its bytes have no checksums. Records on disk have.
    """
    host, why = options.kv_host_memory, "as set"
    if host is None:
        host, why = int(options.kv_host_ratio * plan.total_bytes), f"{options.kv_host_ratio:.0%} of the pools"
    if not options.enable_prefix_caching:
        host = 0
    choices.append(Choice("host tier", f"{host:,} bytes" if host else "off", why))
    disk: DiskTier | None = None
    if options.kv_disk_dir is not None and options.enable_prefix_caching:
        disk = DiskTier(Path(options.kv_disk_dir), options.kv_disk_space)
        choices.append(Choice("disk tier", f"{options.kv_disk_space:,} bytes at most", options.kv_disk_dir))
    else:
        choices.append(Choice("disk tier", "off", "no --kv-disk-dir" if options.kv_disk_dir is None else "no caching"))

    def tiers() -> dict[str, Tier]:
        fresh: dict[str, Tier] = {HOST: HostTier(host)} if host else {}
        return fresh if disk is None else {**fresh, DISK: disk}

    return tiers


def _tiering(coordinator: Coordinator, tiers: dict[str, Tier], packer: BlockPacker) -> Tiering:
    if not tiers:
        return Tiering(coordinator, tiers, None)
    transfers = Transfers(packer, tiers)
    if DISK in tiers:
        transfers.prepare(tiers[DISK].usage().rows_bytes // packer.unit_bytes)
    return Tiering(coordinator, tiers, transfers)


def _in_a_thread_that_ends(work: Callable[[], Result]) -> Result:
    """A thread that has computed keeps OpenMP workers, and once there are more workers than cores all of them sleep
    between operations: the engine's decode then takes twice the time."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


def _warmed_up(
    runner: ModelRunner, steps: WarmUp, limits: SchedulerLimits, kernel_set: KernelSet, progress: Progress
) -> Choice:
    """Run every step that would cost its first request something, where there are such steps."""
    plans: list[StepPlan] = []
    most_seconds = inf
    if runner.arena.device.type != "cpu":
        plans = [*steps.graphs(), *steps.prompts(limits.max_step_tokens)]
    elif kernel_set.repeat is not None:
        most_seconds = _WARM_UP_SECONDS
        plans = [plan for plan in steps.small_decodes(_SMALL_DECODES) for _ in range(2)]  # the second is noted
    begin = time.monotonic()

    def run() -> int:
        for number, plan in enumerate(plans):
            progress("warming up", number, len(plans))
            if time.monotonic() - begin > most_seconds:
                return number
            runner.run(plan)
        return len(plans)

    count = _in_a_thread_that_ends(run)
    compilations = kernel_set.compilations
    compilations.begin_serving()
    if not count:
        return Choice("warm-up", "none", "no step costs more once than again")
    what = f"{compilations.warmed_up} kernels and graphs" if compilations.warmed_up else "the calls of small steps"
    return Choice("warm-up", f"{count} steps, {time.monotonic() - begin:.1f} s", f"{what}: nobody waits for them")


def _checked_products(weights: dict[str, Tensor], kernel_set: KernelSet) -> Choice:
    """Where deterministic mode rests on how this machine's library multiplies, try it on every shape of weights."""
    if all(choice.backend != "deterministic" for choice in kernel_set.choices if choice.op == "linear"):
        return Choice("deterministic", "on", "the compiled kernels compute every row by itself")
    varying = _in_a_thread_that_ends(lambda: varying_shapes(weights.values()))
    if varying:
        raise ConfigError(
            f"deterministic: products with weights of the shape {varying[0]} depend on the batch on this machine",
            param="deterministic",
        )
    return Choice("deterministic", "on", "products with all shapes of weights were tried: rows do not depend on others")


def _about(options: EngineOptions, checkpoint: Checkpoint) -> list[Choice]:
    config = checkpoint.config
    kinds = ", ".join(f"{len(config.layers_of(kind))} {kind.value}" for kind in LayerKind if config.layers_of(kind))
    count = sum(p.elements for p in parameters(config))
    caching = "on" if options.enable_prefix_caching else "off"
    return [
        Choice(
            "model",
            str(checkpoint.directory.name),
            f"{count / 1e6:,.1f} M parameters, {checkpoint.layout.value} layout",
        ),
        Choice("layers", str(config.num_layers), kinds),
        Choice(
            "prefix caching", caching, f"window policy {options.window_policy}, interval {options.checkpoint_interval}"
        ),
    ]


def _device(options: EngineOptions) -> torch.device:
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise ConfigError("device: cuda was asked for, but torch finds no CUDA device here", param="device")
    return torch.device("cuda" if cuda and options.device != "cpu" else "cpu")


def _numerics(
    options: EngineOptions, config: ModelConfig, device: torch.device, *, narrow: bool
) -> tuple[Numerics, list[Choice]]:
    """Dtypes. `narrow`: under fp32 activations too the kernels multiply by weights that stay bfloat16."""
    compute, why = options.dtype, "as set"
    use_cuda = device.type == "cuda"
    if compute == "auto" and narrow and not use_cuda:
        compute, why = "float32", "these kernels' own on a CPU; weights stay as narrow as the checkpoint has them"
    elif compute == "auto":
        wide = 4 * sum(p.elements for p in parameters(config))
        fits = wide <= _FLOAT32_SHARE * psutil.virtual_memory().total
        compute = "float32" if not use_cuda and fits else "bfloat16"
        why = "fp32 weights fit well in memory" if compute == "float32" else "the checkpoint's own width"
    kv, index = _row_formats(options, compute)
    numerics = Numerics.serving(_DTYPES[compute], kv, index, simulate=options.quantization_simulation)
    choices = [
        Choice(
            "device", str(device), "a GPU is there" if use_cuda else "as set" if options.device == "cpu" else "no GPU"
        ),
        Choice("dtype", compute, why),
        Choice("threads", str(torch.get_num_threads()), "as set" if options.threads else "torch's default"),
    ]
    return numerics, choices


def _row_formats(options: EngineOptions, compute: str) -> tuple[RowFormat, RowFormat]:
    """KV rows follow the activations and index keys the KV rows, FP4 ones under simulation: FP8 cannot hold those."""
    kv = RowFormat(compute if options.kv_cache_dtype == "auto" else options.kv_cache_dtype)
    if options.index_cache_dtype != "auto":
        return kv, RowFormat(options.index_cache_dtype)
    return kv, RowFormat.FP4 if kv is RowFormat.FP8 and options.quantization_simulation else kv


def _formats(numerics: Numerics, groups: tuple[CacheGroupSpec, ...], layout: CacheLayout) -> list[Choice]:
    """Formats of the cache with the bytes of a row."""
    streams = {stream.name: stream for spec in groups for stream in spec.streams}
    shown = (
        ("kv cache dtype", "window", numerics.kv_rounding),
        ("index cache dtype", "index", numerics.index_rounding),
    )
    return [
        Choice(
            what,
            layout.format_of(streams[name]).value,
            f"{layout.row_bytes(streams[name])} bytes per row, {layout.padding_bytes(streams[name])} of them padding; "
            f"rounding: {rounding.value}",
        )
        for what, name, rounding in shown
        if name in streams
    ]


def _memory(device: torch.device) -> MemoryFacts:
    if device.type == "cuda":
        return MemoryFacts(*torch.cuda.mem_get_info(device), gpu=True)
    memory = psutil.virtual_memory()
    return MemoryFacts(memory.available, memory.total, gpu=False)


def _cache_plan(
    options: EngineOptions,
    config: ModelConfig,
    numerics: Numerics,
    memory: MemoryFacts,
    weights_size: int,
    choices: list[Choice],
) -> tuple[tuple[CacheGroupSpec, ...], CachePlan]:
    workspace = workspace_bytes(config, options.max_num_batched_tokens, options.max_num_seqs)
    budget, why = cache_budget(options, memory, weights_size, workspace)
    groups = cache_groups(config)
    layout = CacheLayout(numerics.kv, numerics.index, config.rope_dim)
    plan = plan_cache(
        groups,
        layout,
        budget_bytes=budget,
        max_running=options.max_num_seqs,
        spacing_units=window_policy(options, config).spacing_units if options.enable_prefix_caching else 0,
    )
    choices += [*_formats(numerics, groups, layout), Choice("kv cache memory", f"{plan.total_bytes:,} bytes", why)]
    return groups, plan


def _max_model_len(options: EngineOptions, config: ModelConfig, plan: CachePlan, choices: list[Choice]) -> int:
    most = config.max_position_embeddings
    wanted = options.max_model_len or most
    if wanted > most:
        raise ConfigError(f"max_model_len: {wanted} is over the model's {most} positions", param="max_model_len")
    if options.max_model_len and wanted > plan.token_capacity:
        raise ConfigError(
            f"max_model_len: {wanted} tokens do not fit the cache, which holds {plan.token_capacity}; "
            "raise kv_cache_memory or lower max_model_len",
            param="max_model_len",
        )
    length = min(wanted, plan.token_capacity)
    why = "as set" if options.max_model_len else "the model's" if length == most else "what the cache memory holds"
    choices.append(Choice("max model len", f"{length:,} tokens", why))
    return length


def namespaces(
    checkpoint: Checkpoint, numerics: Numerics, policy: CheckpointPolicy, kernel_set: KernelSet
) -> Callable[[Sequence], Namespace]:
    """Prefix caches are shared only under the same weights, tokenizer, layout, numerics, kernels, tenant and salt, and
    never with rows that an approximate policy made. A deterministic engine's bits also depend on the number of
    threads."""
    words = (checkpoint.directory / "tokenizer.json").read_bytes()
    kernels = sorted((choice.op, choice.backend) for choice in kernel_set.choices)
    threads = torch.get_num_threads() if any(backend == "deterministic" for _, backend in kernels) else None
    made_by = (LAYOUT_VERSION, numerics, kernels, threads, policy.unit_tokens, policy.approximation)
    computed = digest_of(fingerprint(checkpoint).encode(), repr(made_by).encode(), words)
    return lambda sequence: namespace_of(computed, sequence.request)


def namespace_of(computed: bytes, request: GenerateRequest) -> Namespace:
    """The namespace of the prefixes that a request may share; `computed` stands for everything that made their rows."""
    tenant, salt = request.tenant.encode(), request.cache_salt.encode()
    own = digest_of(b"own", computed, tenant, salt)
    return Namespace(own, digest_of(b"content", tenant, salt), digest_of(b"tenant", tenant))


def digest_of(*parts: bytes) -> bytes:
    """16 bytes that stand for these parts. They go in with their lengths: none can pass for another."""
    return blake2b(b"".join(len(part).to_bytes(8, "little") + part for part in parts), digest_size=16).digest()
