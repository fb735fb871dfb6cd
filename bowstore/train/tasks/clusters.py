"""Deeper Clustering (Caron et al., ICCV 2019) as the paper compares it: an image's cluster, and its rotation.

Every few epochs all images are clustered by the features of the network as it is, and what it learns next is the
cluster of each image (a bag of one word, so that CutMix and the loss are those of bags). The numbers of clusters mean
nothing from one time to the next, so the head over them and its momenta begin anew, as in the authors' code. Rotations
have a head of their own, a linear one as there, and its loss is added.

Legend: N rows in use, B batch or block of rows, C features, H W pixels, K clusters.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn

from bowstore.clustering.kmeans import kmeans
from bowstore.clustering.lloyd import distinct_rows
from bowstore.data.pipeline import clean_batches
from bowstore.data.plan import Schedule
from bowstore.data.reader import ShardReader, fetched
from bowstore.data.views import Batch, clean_view
from bowstore.errors import TrainingError
from bowstore.exact import cpu_threads, exact_float32
from bowstore.models.backbone import evaluating
from bowstore.models.heads import CosineHead, Heads, LinearHead, class_head
from bowstore.progress import Progress, say
from bowstore.train.schedule import images_in_use, steps_per_epoch
from bowstore.train.tasks.labels import frequency_loss, label_loss
from bowstore.train.tasks.rotation import ROTATIONS, four_rotations
from bowstore.train.tasks.settings import ClustersSettings
from bowstore.train.tasks.supervised import class_loss, make_classes
from bowstore.train.tasks.task import Dead, Job, Logits, Network, Renewal, Task, mixing, placed, pooled
from bowstore.words.targets.bags import Bag

_BLOCK = 256  # rows that are looked at together: what a batch holds decides its rounding, so it is one for all ranks
_LEAST_NORM = 1e-12
_ITERATIONS = 10  # of k-means, as in the authors' code
_CHANCE, _AGREEMENT = "chance_loss", "cluster_agreement"  # in the log


def build(settings: ClustersSettings, job: Job) -> Task:
    """The task of a job.

    Raises:
        UsageError: fewer images than clusters.
    """
    used, features = images_in_use(job.config, len(job.index)), job.backbone.features
    settings.check_images(used)
    head = class_head(settings.head, features, settings.clusters, settings.gamma)
    heads = Heads([head, LinearHead(features, ROTATIONS)]) if settings.rotation else head
    network = Network(job.backbone, heads, pooled)
    renewal = Clusters(settings, job, network, head)

    def bring(batch: Batch) -> tuple[Tensor, ...]:
        device = job.world.device
        return batch.images_BCHW, *placed([renewal.cluster_N[batch.plan.rows]], device), *mixing(batch.plan, device)

    def scalars(logits: Logits, _: Any) -> dict[str, Tensor]:
        return {"gamma": head.gamma} if isinstance(head, CosineHead) else {}

    return Task(
        network=network,
        bring=bring,
        make=_make_turned if settings.rotation else make_classes,
        loss=_loss_of_both if settings.rotation else _loss,
        scalars=scalars,
        constants=renewal.told,
        inputs={"shards": job.index.fingerprint},
        views=ROTATIONS if settings.rotation else 1,
        dead=renewal.dead,
        renewal=renewal,
    )


def _make_turned(images_BCHW: Tensor, *given: Tensor) -> tuple[Tensor, tuple[Bag, Tensor]]:
    """A mixed image is turned as a whole, so that all four have its mixed target."""
    turned_BCHW, quarter_B = four_rotations(images_BCHW)
    words_BM, weights_BM = make_classes(images_BCHW, *given)[1]
    return turned_BCHW, (Bag(words_BM.repeat(ROTATIONS, 1), weights_BM.repeat(ROTATIONS, 1)), quarter_B)


def _loss(logits_BK: Tensor, bag: Bag) -> tuple[Tensor, dict[str, Tensor]]:
    loss, told = class_loss(logits_BK, bag)
    return loss, {"cluster_loss": loss, **told}


def _loss_of_both(logits: Any, targets: tuple[Bag, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    (logits_BK, logits_B4), (bag, quarter_B) = logits, targets
    loss, told = _loss(logits_BK, bag)
    turned, of_turned = label_loss(logits_B4, quarter_B)
    return loss + turned, {**told, "rotation_accuracy": of_turned["accuracy"]}


class Clusters(Renewal):
    """The cluster of each image.

    The images are clustered before the first step; until then row numbers modulo K stand in, for benchmarks.

    Attributes:
        cluster_N: int64.
        told: for the log: the loss of predicting the clusters' frequencies, and how far they agree with those before.
        dead: a run that stays at that loss.
    """

    def __init__(self, settings: ClustersSettings, job: Job, network: Network, head: nn.Module) -> None:
        self._settings, self._job, self._network, self._head = settings, job, network, head
        self._used = images_in_use(job.config, len(job.index))
        config, world = job.config, job.world
        schedule = Schedule(self._used, config.optim.batch, config.seed, world.rank, world.size)
        self._every_steps = settings.every_epochs * steps_per_epoch(config.optim, schedule.steps_per_pass)
        self._made = False
        self.told: dict[str, float] = {}
        self.dead = Dead(
            0.0,
            f"the loss {{cluster_loss:.4f}} is still that of predicting the clusters' frequencies "
            f"({{{_CHANCE}:.4f}}): nothing is learned; try a lower optim.lr",
            gamma=settings.gamma if settings.head == "cosine" else 0.0,
            value="cluster_loss",
        )
        self._take(np.arange(self._used) % settings.clusters)

    def due(self, step: int) -> bool:
        """At the start of every so many epochs, and where there are no clusters of these images yet."""
        return step % self._every_steps == 0 or not self._made

    def renew(self, step: int) -> Iterable[nn.Parameter]:
        """Cluster all images, on rank 0, by features that all ranks take of blocks of them; begin the head anew.

        Raises:
            TrainingError: features that are not finite, or so few distinct ones that there are no K clusters.
        """
        world, before_N = self._job.world, self.cluster_N if self._made else None
        for buffer in self._network.buffers():
            world.take_first(buffer)  # running statistics differ between ranks, and a checkpoint holds rank 0's
        feature_NC = prepared(self._features(step))
        found_N, problem = np.empty(self._used, np.int64), ""
        if world.first:
            problem = self._problem(feature_NC, step)
            if not problem:
                found_N = self._clustered(feature_NC, step)
        if world.any(bool(problem)):
            raise TrainingError(problem) if problem else SystemExit(1)
        world.assembled()  # however long k-means takes: a collective times out
        self._take(world.take_first(torch.from_numpy(found_N).to(world.device)).cpu().numpy())
        self._made = True
        if world.first:
            self._tell(before_N)
        return self._begin_head(step)

    def state_dict(self) -> dict[str, Any]:
        """The clusters, int32, and what the log says of them."""
        return {"clusters": torch.from_numpy(self.cluster_N.astype(np.int32)), "told": dict(self.told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Those of a checkpoint; of a run that used another number of images, or clusters, none."""
        cluster_N = state["clusters"].numpy().astype(np.int64)
        if len(cluster_N) == self._used and cluster_N.max() < self._settings.clusters:
            self._take(cluster_N)
            self._made = True
            self.told.update(state["told"])

    def _take(self, cluster_N: NDArray[np.int64]) -> None:
        self.cluster_N = cluster_N
        self.told[_CHANCE] = self.dead.loss = frequency_loss(cluster_N)

    def _tell(self, before_N: NDArray[np.int64] | None) -> None:
        counts_K = np.bincount(self.cluster_N, minlength=self._settings.clusters)
        line = f"{len(counts_K)} clusters of {self._used} images, of {counts_K.min()} to {counts_K.max()} each"
        if before_N is not None:
            agreement = self.told[_AGREEMENT] = float(normalized_mutual_info_score(before_N, self.cluster_N))
            line += f"; normalised mutual information with those before: {agreement:.3f}"
        say(line)

    def _features(self, step: int) -> NDArray[np.float32]:
        """Pooled features of all images in use, float32 (N, C) on rank 0; each rank takes a share of their blocks."""
        world, features = self._job.world, self._network.backbone.features
        blocks = [np.arange(start, min(start + _BLOCK, self._used)) for start in range(0, self._used, _BLOCK)]
        feature_NC = np.empty((self._used if world.first else 0, features), np.float32)
        what, mine = f"clusters at step {step}", self._of_blocks(blocks[world.rank :: world.size])
        with Progress(what, self._used, shown=world.first) as progress:
            for first in range(0, len(blocks), world.size):
                turn = blocks[first : first + world.size]
                own_BC = torch.zeros(_BLOCK, features, device=world.device)
                if world.rank < len(turn):
                    block_BC = next(mine)
                    own_BC[: len(block_BC)] = block_BC
                parts = world.gathered(own_BC)
                if world.first:
                    for rows_B, part_BC in zip(turn, parts, strict=False):
                        feature_NC[rows_B] = part_BC[: len(rows_B)].cpu().numpy()
                progress.advance(sum(map(len, turn)))
        return feature_NC

    def _of_blocks(self, blocks: list[NDArray[np.int64]]) -> Iterator[Tensor]:
        """Features (B, C) of each block of rows, in eval mode and in full float32."""
        config, index, device = self._job.config, self._job.index, self._job.world.device
        source = ShardReader(fetched(index, images=self._used, whole=True, display=self._job.world.first))
        backbone, form = self._network.backbone, self._network.memory_format(device)
        how: dict[str, Any] = {"batch": _BLOCK, "device": device, "threads": config.runtime.threads}
        batches = clean_batches(source, clean_view(config.view), iter(blocks), **how)
        for rows_B in blocks:
            parts: list[Tensor] = []
            while sum(map(len, parts)) < len(rows_B):  # one of very large images comes in several
                images_BCHW = next(batches)[1].float().contiguous(memory_format=form)
                with evaluating(backbone), exact_float32(), cpu_threads(device, 1), torch.no_grad():
                    parts.append(backbone(images_BCHW).float())
            yield torch.cat(parts)

    def _problem(self, feature_NC: NDArray[np.float32], step: int) -> str:
        """Why these features cannot be clustered, or nothing."""
        images, clusters = self._used, self._settings.clusters
        what = f"task clusters, step {step}: the features of {images} images"
        if bad := int((~np.isfinite(feature_NC).all(axis=1)).sum()):
            return (
                f"{what} hold NaN or infinity in {bad} of them; lower optim.lr and run again with --resume, or under "
                f"another --name from the start"
            )
        if (distinct := len(distinct_rows(feature_NC, clusters))) < clusters:
            return (
                f"{what} are only {distinct} distinct ones, too few for {clusters} clusters: the network has collapsed "
                f"(lower optim.lr and train under another --name), or the images are copies (lower task.clusters)"
            )
        return ""

    def _clustered(self, feature_NC: NDArray[np.float32], step: int) -> NDArray[np.int64]:
        """Clusters by k-means, int64 (N,)."""
        found = kmeans(
            feature_NC,
            self._settings.clusters,
            seed=self._seed(step),
            iterations=_ITERATIONS,
            device=self._job.world.device,
        )
        return found.words_S

    def _begin_head(self, step: int) -> Iterable[nn.Parameter]:
        """Random weights for the head over the clusters, the same on every rank and device."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self._seed(step))
            how = self._settings
            fresh = class_head(how.head, self._network.backbone.features, how.clusters, how.gamma)
            for parameter, value in zip(self._head.parameters(), fresh.parameters(), strict=True):
                parameter.copy_(value)
        return self._head.parameters()

    def _seed(self, step: int) -> int:
        return int(np.random.SeedSequence([self._job.config.seed, step]).generate_state(1)[0])


def prepared(feature_NC: NDArray[np.float32]) -> NDArray[np.float32]:
    """Features as they are clustered: of length 1, as in the authors' code, which first takes principal components.

    Those are of fully connected layers of 4096 units; the pooled features here have 64 to 2048 dimensions.
    """
    norm_N1 = np.linalg.norm(feature_NC, axis=1, keepdims=True)
    unit_NC: NDArray[np.float32] = feature_NC / np.maximum(norm_N1, np.float32(_LEAST_NORM))
    return unit_NC
