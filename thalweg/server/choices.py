"""Several generations of one prompt as one stream of pieces; ends them all when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable

from starlette.requests import Request

from thalweg.errors import CancelledError
from thalweg.server.generation import Generation, Piece
from thalweg.types import Usage


async def merged(generations: list[Generation]) -> AsyncGenerator[tuple[int, Piece], None]:
    """(choice, piece) as they come, until every choice has ended. Closing this iterator cancels what still runs."""
    queue: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue()

    async def pump(index: int, generation: Generation) -> None:
        try:
            async for piece in generation.pieces():
                queue.put_nowait((index, piece))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(i, g)) for i, g in enumerate(generations)]
    try:
        left = len(generations)
        while left:
            index, piece = await queue.get()
            if isinstance(piece, BaseException):
                raise piece
            left -= piece.finish is not None
            yield index, piece
    finally:
        for task in tasks:
            task.cancel()
        close_all(generations)


PATIENCE_SECONDS = 1.0  # headers wait so long for the engine to take a request in


async def expectations(generations: list[Generation]) -> dict[str, str]:
    """The header that says when the first token is expected, once all are taken in. Raises what refused one."""
    try:
        await asyncio.gather(*(generation.taken_in(PATIENCE_SECONDS) for generation in generations))
    except BaseException:
        close_all(generations)
        raise
    expected = [g.expected_seconds for g in generations if g.expected_seconds is not None]
    return {"X-Thalweg-Expected-TTFT-Seconds": f"{max(expected):.3f}"} if expected else {}


def close_all(generations: Iterable[Generation]) -> None:
    """End what the engine still works on."""
    for generation in generations:
        generation.close()


async def collected(request: Request, generations: list[Generation]) -> list[list[Piece]]:
    """All pieces of every choice. A client that disconnects meanwhile ends them: CancelledError."""
    pieces: list[list[Piece]] = [[] for _ in generations]

    async def collect() -> None:
        async for index, piece in merged(generations):
            if piece.progress is None:
                pieces[index].append(piece)

    work = asyncio.create_task(collect())
    watch = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise CancelledError("the client disconnected")
        work.result()
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)
    return pieces


def final_usages(pieces: list[list[Piece]]) -> list[Usage]:
    """What each choice cost."""
    return [own[-1].usage for own in pieces if own[-1].usage is not None]


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
