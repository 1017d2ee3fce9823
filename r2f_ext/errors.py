"""The one exception that users are meant to read, and what tells that memory did not suffice."""


class R2FError(Exception):
    """Bad input or an impossible request, described in one sentence that names the thing and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


# Messages of the CPU and CUDA allocators; torch.OutOfMemoryError is a RuntimeError with the first of them.
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator raised the error."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def expected(error: Exception) -> str:
    """The sentence on an error that input or memory caused; any other error is raised again."""
    if isinstance(error, R2FError):
        return str(error)
    if out_of_memory(error):
        return "out of memory."
    raise error
