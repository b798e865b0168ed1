"""The prefix index: a radix tree over units of tokens, per namespace.

A node is one unit (128 tokens for V4) after its parent's. It holds the blocks of the compressed groups for its tokens
and, at some boundaries, a checkpoint: the blocks of the sliding groups that are needed to resume right after it.
The index never allocates: it keeps references to blocks that requests wrote.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from thalweg.cache.geometry import Group
from thalweg.cache.keys import TokenKeys, UnitKeys
from thalweg.cache.policy import CheckpointReason
from thalweg.cache.retention import priority, risen

_EVICTED_REMEMBERED = 1 << 16  # digests kept to tell `evicted` from `diverged`; 9 MiB at most
_ROOTS_KEPT = 4096  # namespaces; beyond that, those without a unit are forgotten

Blocks = Mapping[Group, tuple[int, ...]]
Queued = tuple[float, int, int, "UnitNode"]  # value, when it was used, serial number


@dataclass(frozen=True, slots=True)
class Namespace:
    """What separates prefixes. `own` stands for weights, numerics, layout, tenant and salt together: only equal ones
    share. `content` leaves out what computed the rows, `tenant` also the salt: both only explain misses."""

    own: bytes
    content: bytes = b""
    tenant: bytes = b""


def unit_digest(parent: bytes, key: bytes) -> bytes:
    """16 bytes that stand for a unit and everything before it; `key` are its tokens as int32, little endian."""
    return blake2b(parent + key, digest_size=16).digest()


class UnitNode:
    """One unit of a cached prefix. `depth` counts units from the root (whose depth is 0)."""

    __slots__ = (
        "alive", "blocks", "checkpoint", "checkpoint_stored", "checkpoint_uses", "checkpoint_value", "children",
        "depth", "digest", "key", "namespace", "parent", "pins", "queued", "reason", "saved_tokens", "sorted_keys",
        "stored", "used", "uses", "value",
    )  # fmt: skip

    def __init__(
        self, parent: UnitNode | None, key: bytes, blocks: Mapping[Group, int], used: int, namespace: Namespace
    ) -> None:
        self.parent = parent
        self.key = key
        self.namespace = namespace
        self.depth: int = parent.depth + 1 if parent else 0
        self.digest: bytes = unit_digest(parent.digest if parent else b"", key)
        self.children: dict[bytes, UnitNode] = {}
        self.sorted_keys: list[bytes] = []  # of the children, where there are several
        self.blocks = dict(blocks)
        self.checkpoint: dict[Group, tuple[int, ...]] | None = None
        self.reason: CheckpointReason | None = None  # of the checkpoint
        self.stored = False  # rows are in a lower tier, or on their way there
        self.checkpoint_stored = False
        self.used = used  # when, by the index's clock
        self.uses = 1
        self.value = 0.0  # what keeping the rows is worth; see retention.py
        self.saved_tokens = 0  # by the checkpoint
        self.checkpoint_uses = 1
        self.checkpoint_value = 0.0
        self.pins = 0
        self.queued = 0  # the eviction queues that have an entry of this unit, as bits
        self.alive = True


@dataclass(frozen=True, slots=True)
class Match:
    """How far a prompt is known. `path` has the matching units from the first on; `resume` <= len(path) is the
    number of units after which a checkpoint exists."""

    path: tuple[UnitNode, ...]
    resume: int
    next_was_evicted: bool


class PrefixIndex:
    """See the module. `unit_tokens` is the step of the tree."""

    def __init__(self, unit_tokens: int, keys: UnitKeys | None = None) -> None:
        self.unit_tokens = unit_tokens
        self._keys = keys or TokenKeys(unit_tokens)
        self._roots: dict[bytes, UnitNode] = {}
        self._tenants: defaultdict[bytes, set[bytes]] = defaultdict(set)  # roots of a tenant
        self._clock = 0
        self._leaves: list[Queued] = []
        self._checkpoints: list[Queued] = []
        self._serial = 0
        self._unit_age = self._checkpoint_age = 0.0
        self._evicted: OrderedDict[bytes, None] = OrderedDict()
        self.nodes = 0

    def root(self, namespace: Namespace) -> UnitNode:
        """The root of a namespace, made on first use."""
        root = self._roots.get(namespace.own)
        if root is None:
            if len(self._roots) >= _ROOTS_KEPT:
                self._forget_empty_roots()
            root = self._roots[namespace.own] = UnitNode(None, namespace.own, {}, 0, namespace)
            self._tenants[namespace.tenant].add(namespace.own)
        return root

    def _forget_empty_roots(self) -> None:
        for own in [own for own, root in self._roots.items() if not root.children and root.pins == 0]:
            root = self._roots.pop(own)
            root.alive = False
            self._tenants[root.namespace.tenant].discard(own)

    def digests(self, namespace: Namespace, tokens: Any, units: int) -> list[bytes]:
        """The digests of the first `units` units of a prompt."""
        parent, found = unit_digest(b"", namespace.own), []
        for key in self._keys.first_keys(tokens, units):
            parent = unit_digest(parent, key)
            found.append(parent)
        return found

    def content_digest(self, namespace: Namespace, tokens: Any) -> bytes:
        """Stands for a prompt's first unit whatever model computed it."""
        return unit_digest(namespace.content, self._keys.key(tokens, 0))

    def under_other_salt(self, namespace: Namespace, tokens: Any) -> bool:
        """Whether the same tenant has the first unit of these tokens under another salt."""
        key = self._keys.key(tokens, 0)
        others = self._tenants.get(namespace.tenant, set()) - {namespace.own}
        return any(key in self._roots[own].children for own in others)

    def match(self, namespace: Namespace, tokens: Any, limit_units: int) -> Match:
        """The longest known prefix of `tokens` within `limit_units` units. Changes nothing."""
        node = self._roots.get(namespace.own)
        if node is None:
            return Match((), 0, False)
        path: list[UnitNode] = []
        resume, evicted = 0, False
        for key in self._keys.first_keys(tokens, limit_units):
            child = node.children.get(key)
            if child is None:
                evicted = self._was_evicted(node, key)
                break
            path.append(child)
            node = child
            if node.checkpoint is not None:
                resume = node.depth
        return Match(tuple(path), resume, evicted)

    def common_tokens(self, namespace: Namespace, match: Match, tokens: Any) -> int:
        """The first token of a matched prompt that no known prefix has."""
        node = match.path[-1] if match.path else self._roots.get(namespace.own)
        known = len(match.path) * self.unit_tokens
        if node is None or not node.children or known >= len(tokens):
            return known
        key = self._keys.key(tokens, len(match.path))
        place = bisect_left(node.sorted_keys, key)  # the longest common beginning is a neighbour's in their order
        nearest = node.sorted_keys[max(0, place - 1) : place + 1] or list(node.children)
        return known + max(self._keys.common(other, key) for other in nearest)

    def touch(self, path: tuple[UnitNode, ...], resumed: UnitNode | None) -> None:
        """Mark units, and the checkpoint that a request resumed at, as used now."""
        self._clock += 1
        now, age, unit = self._clock, self._unit_age, self.unit_tokens
        for node in path:
            node.used = now
            node.uses += 1
            node.value = priority(age, node.uses, unit, unit)
        if resumed is not None:
            resumed.checkpoint_uses += 1
            self._value_checkpoint(resumed)

    def _value_checkpoint(self, node: UnitNode) -> None:
        node.checkpoint_value = priority(
            self._checkpoint_age, node.checkpoint_uses, node.saved_tokens, self.unit_tokens
        )

    def child(self, node: UnitNode, tokens: Any) -> UnitNode | None:
        """The known unit after `node` with the same tokens as the sequence `tokens` has there."""
        return node.children.get(self._keys.key(tokens, node.depth))

    def insert(self, node: UnitNode, tokens: Any, blocks: Mapping[Group, int]) -> UnitNode:
        """Add the unit after `node`. The caller has given the index its references."""
        self._clock += 1
        key = self._keys.key(tokens, node.depth)
        assert node.alive and key not in node.children, "a unit was inserted twice or under a dead one"
        child = UnitNode(node, key, blocks, self._clock, node.namespace)
        child.value = priority(self._unit_age, 1, self.unit_tokens, self.unit_tokens)
        node.children[key] = child
        if node.sorted_keys:
            insort(node.sorted_keys, key)
        elif len(node.children) > 1:
            node.sorted_keys = sorted(node.children)
        self._evicted.pop(child.digest, None)
        self.nodes += 1
        self._offer(self._leaves, child)
        return child

    def set_checkpoint(self, node: UnitNode, blocks: Blocks, reason: CheckpointReason, saved_tokens: int) -> None:
        """Attach a checkpoint to a unit that has none. The caller has given the index its references."""
        assert node.alive and node.checkpoint is None, "a checkpoint was set twice or on a dead unit"
        node.checkpoint, node.reason, node.saved_tokens = dict(blocks), reason, saved_tokens
        node.checkpoint_uses = 1
        self._value_checkpoint(node)
        self._offer(self._checkpoints, node)

    def pin(self, node: UnitNode) -> None:
        """Protect a unit from eviction while a request stands on it."""
        node.pins += 1

    def unpin(self, node: UnitNode) -> None:
        assert node.pins > 0, "unpinned more often than pinned"
        node.pins -= 1
        if node.alive and node.parent is not None and not node.children:
            self._offer(self._leaves, node)

    def evict_unit(self, evictable: Callable[[UnitNode], bool]) -> UnitNode | None:
        """Remove the leaf of least value that nobody stands on and `evictable` accepts; None if there is none."""
        node = self._take(self._leaves, lambda n: not n.children and n.pins == 0, evictable)
        if node is not None:
            self._unit_age = risen(self._unit_age, node.value)
            self._detach(node)
            self._remember(node.digest)
        return node

    def evict_checkpoint(self, evictable: Callable[[UnitNode], bool]) -> Blocks | None:
        """Take the checkpoint of least value that `evictable` accepts off its unit; None if there is none."""
        node = self._take(self._checkpoints, lambda n: n.checkpoint is not None, evictable)
        if node is None:
            return None
        self._checkpoint_age = risen(self._checkpoint_age, node.checkpoint_value)
        blocks, node.checkpoint = node.checkpoint, None
        return blocks

    def clear(self) -> Iterator[UnitNode]:
        """Remove every unit; yields them so that the caller drops the index's references."""
        pending = [child for root in self._roots.values() for child in root.children.values()]
        for root in self._roots.values():
            root.alive = False
        self._roots.clear()
        self._tenants.clear()
        self._leaves.clear()
        self._checkpoints.clear()
        self._evicted.clear()
        self.nodes = 0
        while pending:
            node = pending.pop()
            pending.extend(node.children.values())
            node.alive = False
            node.children = {}
            yield node

    def units(self) -> Iterator[UnitNode]:
        """Every unit in the tree: for checks and reports."""
        pending = [child for root in self._roots.values() for child in root.children.values()]
        while pending:
            node = pending.pop()
            pending.extend(node.children.values())
            yield node

    def _offer(self, heap: list[Queued], node: UnitNode) -> None:
        if node.queued & self._bit(heap):
            return  # one entry per unit and queue, or a long-lived unit would gather them
        node.queued |= self._bit(heap)
        self._serial += 1
        heapq.heappush(heap, (*self._rank(heap, node), self._serial, node))

    def _bit(self, heap: list[Queued]) -> int:
        return 1 if heap is self._leaves else 2

    def _rank(self, heap: list[Queued], node: UnitNode) -> tuple[float, int]:
        """By value, then by when it was used."""
        return (node.value if heap is self._leaves else node.checkpoint_value), node.used

    def _take(
        self,
        heap: list[Queued],
        candidate: Callable[[UnitNode], bool],
        evictable: Callable[[UnitNode], bool],
    ) -> UnitNode | None:
        """Pop the candidate of least value. Entries are lazy: one used since is put back, a refused one set aside."""
        refused: list[UnitNode] = []
        found = None
        while heap and found is None:
            value, used, _, node = heapq.heappop(heap)
            node.queued &= ~self._bit(heap)
            if not node.alive or not candidate(node):
                continue
            if (value, used) != self._rank(heap, node):
                self._offer(heap, node)
            elif evictable(node):
                found = node
            else:
                refused.append(node)
        for node in refused:
            self._offer(heap, node)
        return found

    def _detach(self, node: UnitNode) -> None:
        node.alive = False
        self.nodes -= 1
        parent = node.parent
        assert parent is not None, "a root is never evicted"
        del parent.children[node.key]
        if parent.sorted_keys:
            del parent.sorted_keys[bisect_left(parent.sorted_keys, node.key)]
        if parent.parent is not None and not parent.children:
            self._offer(self._leaves, parent)

    def _remember(self, digest: bytes) -> None:
        self._evicted[digest] = None
        if len(self._evicted) > _EVICTED_REMEMBERED:
            self._evicted.popitem(last=False)

    def _was_evicted(self, node: UnitNode, key: bytes) -> bool:
        return bool(self._evicted) and unit_digest(node.digest, key) in self._evicted
