"""How words are computed: a layer records it, and an unfinished layer is continued in the same way, by every rank.

Words computed in two ways differ only where two centroids are almost equally near, so complete layers and
vocabularies are equally good whichever way they were made. But what a layer holds must not depend on who was
interrupted when.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bowstore.errors import MismatchError, UsageError
from bowstore.models.compiled import EAGER, FROZEN, CannotCompileError, tell_fallback
from bowstore.progress import say, timed
from bowstore.torchrun import ranks
from bowstore.words.encode.job import Job
from bowstore.words.store.layer import Layer, in_words
from bowstore.words.store.writer import StoreWriter

Arithmetic = Mapping[str, str]


def in_one_way(job: Job) -> Job:
    """The job, its teacher run as unfinished layers were begun; without any, as the setting and the amount of work say.

    Compiles the teacher if that is called for and not yet done. Call it in the main thread.

    Raises:
        MismatchError: an unfinished layer was begun in a way that is not asked for, or not possible here.
        UsageError: compiling was asked for, and is not possible.
    """
    writer = StoreWriter(job.store) if job.store.exists() else None
    layers = [writer.layer(name) for name in job.names if name in writer.layers] if writer else []
    begun = [layer for layer in layers if not layer.complete]
    if len(layers) == len(job.layers) and not begun:
        return job  # nothing is left to do
    return _run_in(job, _begun_way(job, begun), begun) if begun else in_new_way(job)


def in_new_way(job: Job) -> Job:
    """The job, its teacher run as for new layers; see `in_one_way`."""
    return _run_in(job, _new_way(job), ())


def _run_in(job: Job, way: str, begun: Sequence[Layer]) -> Job:
    if way == EAGER:
        return replace(job, teacher=replace(job.teacher, compiled=None))
    if job.teacher.compiled:
        return job
    if ranks().first:
        say("compiling the teacher (10 to 50 s)")
    try:
        with timed(job.seconds, "compile"):
            return replace(job, teacher=job.teacher.compiled_for(job.batch))
    except CannotCompileError as error:
        if begun:
            raise MismatchError(
                f"layer {begun[0].name!r} of word store {job.store} is not complete and was begun with trunk "
                f"{FROZEN!r}, but {error}; go on where that can be had, or encode into a new store"
            ) from error
        if job.config.compile is True:
            raise UsageError(f"{error}; leave --compile out to do without") from error
        tell_fallback(str(error))
        return job


def _begun_way(job: Job, begun: Sequence[Layer]) -> str:
    """How the teacher ran when these layers were begun."""
    ways = {layer.arithmetic["trunk"] for layer in begun}
    if len(ways) > 1:
        raise MismatchError(
            f"layers {', '.join(layer.name for layer in begun)} of word store {job.store} are not complete, and were "
            f"begun with trunk {' and '.join(map(repr, sorted(ways)))}; encode them one by one"
        )
    way, setting = ways.pop(), job.config.compile
    for layer in begun:
        check_same(layer, {**job.arithmetic, "trunk": way if way in (EAGER, FROZEN) else job.teacher.trunk})
    if setting != "auto" and setting != (way == FROZEN):
        raise MismatchError(
            f"layer {begun[0].name!r} of word store {job.store} is not complete and was begun with trunk {way!r}; "
            "leave --compile out to go on with it, or encode into a new store"
        )
    return way


def _new_way(job: Job) -> str:
    """How the teacher runs for new layers; under another store's words as it ran there: the two may be joined."""
    if job.source and job.config.compile == "auto":
        return job.source.vocabulary_layer(job.names[0]).arithmetic["trunk"]
    return job.teacher.way_of(job.config.compile, len(job.index))


def as_rank_0(job: Job, way: str) -> Job:
    """The job, its teacher run as on rank 0.

    Raises:
        MismatchError: that is not possible here.
    """
    found = _run_in(job, way, ())
    if found.teacher.trunk != way:
        raise MismatchError(
            f"rank {ranks().rank} cannot compile the teacher as rank 0 has; encode on machines that can, or with "
            "--compile false"
        )
    return found


def check_same(layer: Layer, now: Arithmetic) -> None:
    """Refuse to continue an unfinished layer in another way.

    Raises:
        MismatchError: names the first way that differs.
    """
    then = layer.arithmetic
    for what in then.keys() | now.keys():
        if then.get(what) != now.get(what):
            raise MismatchError(
                f"layer {layer.name!r} of word store {layer.path} is not complete and was begun with {what} "
                f"{then.get(what)!r}, now it would be {now.get(what)!r}; encode into a new store: --vocabulary "
                f"{layer.path} --store NEW keeps its words"
            )


def tell_difference(layer: Layer, now: Arithmetic) -> None:
    """Say that images get words of a complete layer's vocabulary in another way than the layer's own images did."""
    then = layer.arithmetic
    if then != dict(now):
        say(
            f"layer {layer.name!r} of word store {layer.path} was made with {in_words(then)}; these images are encoded "
            f"with {in_words(now)}: their words differ from its way's only where two words are all but equally near"
        )
