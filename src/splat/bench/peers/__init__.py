"""Peers by name, and which of them take part."""

from __future__ import annotations

from collections.abc import Sequence

from splat.bench.peers import ours
from splat.bench.peers.base import Contender, Kind, Layout, Ready
from splat.bench.peers.cupy_peers import CUSPARSE
from splat.bench.peers.jax_peers import BCOO, CUDNN, DENSE
from splat.bench.peers.scipy_peers import SCIPY
from splat.bench.peers.torch_peers import FLEX, SDPA, TORCH_SPARSE
from splat.errors import ArgumentError

#: name -> peer, in the order of tables.
PEERS: dict[str, Contender] = {one.name: one for one in (DENSE, BCOO, SCIPY, TORCH_SPARSE, SDPA, FLEX, CUDNN, CUSPARSE)}

#: `--against none`.
NOBODY = "none"


def chosen(
    names: Sequence[str], ops: Sequence[str], device: str, quick: bool
) -> tuple[list[Contender], dict[str, str]]:
    """(peers that take part, why the others do not). Without names: all that can.

    Raises ArgumentError for a name that is none, and for one that was asked for and cannot be used.
    """
    unknown = [name for name in names if name not in PEERS and name != NOBODY]
    if unknown:
        known = ", ".join([*PEERS, NOBODY])
        raise ArgumentError(f"--against must name some of {known}, but {', '.join(unknown)} was given")
    taking_part, left_out = [], {}
    for name, peer in PEERS.items():
        if not set(ops) & set(peer.make):
            continue  # it has nothing to do with these operations
        reason = peer.missing(device)
        if names and name not in names:
            left_out[name] = "not named by --against"
        elif reason and names:
            raise ArgumentError(f"--against {name}: {reason}")
        elif reason:
            left_out[name] = reason
        elif quick and peer.slow_to_prepare and not names:
            left_out[name] = "slow to prepare: with --quick only if named by --against"
        else:
            taking_part.append(peer)
    return taking_part, left_out


__all__ = ["NOBODY", "PEERS", "Contender", "Kind", "Layout", "Ready", "chosen", "ours"]
