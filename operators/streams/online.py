"""Online streams: images come one by one, and what learns is looked at after every few of them.

Tasks have no boundaries here: their images, each task's in a drawn order, are one sequence, and
every section of it is a task of the stream. A learner sees the classes of a section, no more.

Source: Koh et al., Online Continual Learning on Class Incremental Blurry Task Configuration with
Anytime Inference, ICLR 2022.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from graftwork.operators.streams.draws import Draws
from graftwork.operators.streams.stream import Piece, first_seen


def arriving(pieces: Sequence[Piece], seed: int) -> list[Piece]:
    """The tasks with an order of their images, drawn where there is none yet."""
    draws = Draws(seed)
    return [
        replace(piece, arrival=piece.rows[draws.permutation(len(piece.rows))])
        if piece.arrival is None
        else piece
        for piece in pieces
    ]


def sections(pieces: Sequence[Piece], every: int) -> list[Piece]:
    """The sequence of all images in sections.

    Args:
        pieces: tasks of one data set, `arriving`.
        every: images of a section; the last one may have fewer.
    """
    arrivals = [piece.arrival for piece in pieces if piece.arrival is not None]
    sequence, found = np.concatenate(arrivals), []
    begun = np.cumsum([0, *map(len, arrivals)])[:-1]
    for start in range(0, len(sequence), every):
        own = sequence[start : start + every]
        stop = start + len(own)
        tested = [
            piece.tested
            for piece, first in zip(pieces, begun, strict=True)
            if start <= first < stop
        ]
        whole = pieces[0]
        found.append(
            replace(
                whole,
                name=f"{stop} images",
                rows=np.unique(own),
                tested=np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *tested])),
                order=first_seen(whole.train.labels[own]),
                arrival=own,
            )
        )
    return found
