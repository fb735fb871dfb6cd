"""How words are computed: a layer records it, and an unfinished layer is continued in the same way, by every rank.

Words computed in two ways differ only where two centroids are almost equally near, so complete layers and
vocabularies are equally good whichever way they were made. But what a layer holds must not depend on who was
interrupted when.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bowstore.errors import MismatchError, UsageError
from bowstore.models.compiled import FROZEN, CannotCompileError, tell_fallback
from bowstore.progress import say, timed
from bowstore.torchrun import ranks
from bowstore.words.encode.job import Job
from bowstore.words.store.layer import Layer, in_words


def in_one_way(job: Job, begun: Sequence[Layer] = ()) -> Job:
    """The job, its teacher run as these unfinished layers were begun; else as the settings and the amount of work say.

    Compiles the teacher if that is called for. Call it in the main thread.

    Raises:
        MismatchError: an unfinished layer was begun in a way that is not asked for, or not possible here.
        UsageError: compiling was asked for, and is not possible.
    """
    setting = job.config.compile
    if setting == "auto" and begun:
        way = begun[0].arithmetic["trunk"]
    elif setting == "auto" and job.source:  # as images were encoded there: the two stores may be joined
        way = job.source.vocabulary_layer(next(iter(job.num_words))).arithmetic["trunk"]
    else:
        way = job.teacher.way_of(setting, len(job.index))
    job = run_in(job, way)
    for layer in begun:
        _check_same(layer, job.arithmetic)
    return job


def run_in(job: Job, way: str) -> Job:
    """The job, its teacher compiled if that is the way and it can be had; other ranks must run it as rank 0 does.

    Raises:
        MismatchError: this is another rank, and cannot compile.
        UsageError: compiling was asked for, and is not possible.
    """
    if way != FROZEN:
        return job
    rank = ranks()
    if rank.first:
        say("compiling the teacher (10 to 50 s)")
    try:
        with timed(job.seconds, "compile"):
            return replace(job, teacher=job.teacher.compiled_for(job.batch))
    except CannotCompileError as error:
        if not rank.first:
            raise MismatchError(
                f"rank {rank.rank} cannot compile the teacher as rank 0 has ({error}); encode on machines that can, or "
                "with --compile false"
            ) from error
        if job.config.compile is True:
            raise UsageError(f"{error}; leave --compile out to do without") from error
        tell_fallback(str(error))
        return job


def _check_same(layer: Layer, now: Mapping[str, str]) -> None:
    """Refuse to continue an unfinished layer in another way, naming the first that differs."""
    then = layer.arithmetic
    for what in then.keys() | now.keys():
        if then.get(what) != now.get(what):
            raise MismatchError(
                f"layer {layer.name!r} of word store {layer.path} is not complete and was begun with {what} "
                f"{then.get(what)!r}, now it would be {now.get(what)!r}; go on with it alone, without --compile and "
                f"where it was begun, or encode into a new store: --vocabulary {layer.path} --store NEW keeps its words"
            )


def tell_difference(layer: Layer, now: Mapping[str, str]) -> None:
    """Say that images get words of a complete layer's vocabulary in another way than the layer's own images did."""
    then = layer.arithmetic
    if then != dict(now):
        say(
            f"layer {layer.name!r} of word store {layer.path} was made with {in_words(then)}; these images are encoded "
            f"with {in_words(now)}: their words differ from its way's only where two words are all but equally near"
        )
