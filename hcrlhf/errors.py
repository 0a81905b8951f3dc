"""The one exception that means "the input is wrong", as against "the program is wrong"."""


class InputError(Exception):
    """Something the user gave cannot be used: a file, a folder, a setting.

    Its message is one line: what was given, what was expected, what to do. The command line prints
    that line alone and exits with code 2; every other exception keeps its traceback. Not a
    ValueError: a config parser that tries one type after another would swallow it.
    """
