"""What values may be wherever they come from: the command line or a configuration."""

MAX_COUNT = 2**31 - 1  # what the C libraries below take
MAX_BATCH = 2**20
MAX_FLOAT = 3e38  # what float32 holds
MAX_SEED = 2**32 - 1
MAX_THREADS = 1024  # and processes
KEPT_IMAGES = 16  # nearest to each word, in a store
MAX_WORDS = 65535  # ids are uint16, and 65535 itself means "not written"


def text_problem(text: str) -> str | None:
    """What keeps a text from being used and recorded, or None."""
    if not text:
        return "is empty (is a shell variable not set?)"
    if "\0" in text:
        return "holds a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "is not UTF-8 text; rename what it names, or make a link to it"
    return None


def path_problem(path: str) -> str | None:
    """What keeps a path from being used and recorded, or None."""
    if path == "~" or path.startswith("~/"):
        return "begins with ~, which only a shell expands; write the folder's whole name"
    return text_problem(path)
