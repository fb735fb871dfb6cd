"""Processes of tests come from one server that imports torch, DALI and FAISS once: each would need seconds for them."""

from multiprocessing import get_context

SERVER = get_context("forkserver")
# The server takes the list of whoever asks first, so there is only one.
SERVER.set_forkserver_preload([
    "bowstore.train.loop",
    "bowstore.words.encode.encode",
    "bowstore.models.saved",
    "coloured_keys",
    "torch._dynamo",
    "torch.utils.tensorboard",
])  # fmt: skip
