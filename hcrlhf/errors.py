"""The one exception that means "the input is wrong", as against "the program is wrong".

And how a lack of memory is known, which is neither.
"""


class InputError(Exception):
    """Something the user gave cannot be used: a file, a folder, a setting.

    Its message is one line: what was given, what was expected, what to do. The command line prints
    that line alone and exits with code 2; every other exception keeps its traceback. Not a
    ValueError: a config parser that tries one type after another would swallow it.
    """


# What CUDA's libraries say that allocate beside PyTorch's allocator; in plain RuntimeErrors.
_NO_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that a device's memory ran out."""
    from torch import OutOfMemoryError

    known = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    return known or isinstance(error, OutOfMemoryError)
