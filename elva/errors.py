"""Errors that a person can mend, one family: one line each, `<what>: <rule>; <what to do>`."""

import traceback
import unicodedata
from tokenize import TokenError

MAX_MESSAGE = 600
"""Ours, characters: what is wrong in a cell of megabytes is still a line to read."""


class UserError(ValueError):
    """Bad input or a state that the user can change, in one line of plain text, whatever a file
    that it quotes holds.

    Args:
        message: Shortened in its middle: it begins with the place and ends with what to do.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_shortened(printable(_shortened(str(message)))))


def _shortened(text: str) -> str:
    half = MAX_MESSAGE // 2
    return text if len(text) <= MAX_MESSAGE else f"{text[:half]}...{text[-half:]}"


class DataError(UserError):
    """Bad data: `file:line: rule`."""


class PictureFault(DataError):
    """Why a picture cannot be shown, without its name.

    Args:
        kind: `missing`, `large`, `damaged`, or `HEIF` and `AVIF` where what reads them is not
            there.
    """

    def __init__(self, reason: str, kind: str = "damaged") -> None:
        super().__init__(reason)
        self.kind = kind


class RunError(UserError):
    """A run directory that cannot be used as asked."""


class IndexFault(UserError):
    """An index that is damaged, foreign or busy, or what does not fit into it."""


NPY_FAULTS = (OSError, ValueError, EOFError, TypeError, SyntaxError, TokenError, OverflowError)
"""What numpy raises of a .npy file that is none: it reads the header as a piece of Python."""


def torchvision_is_foreign(error: BaseException) -> bool:
    """Whether it began where torchvision, which transformers imports where it is installed, does
    not load: PyPI's was built for another torch than, say, a CPU's."""
    link: BaseException | None = error
    while link is not None:
        for frame, _ in traceback.walk_tb(link.__traceback__):
            module = str(frame.f_globals.get("__name__", ""))
            if module.split(".")[0] == "torchvision" and frame.f_code.co_name == "<module>":
                return True
        link = link.__cause__ or link.__context__
    return False


def refused_by_kernels(error: BaseException) -> bool:
    """Whether `elva_kernels` raised it: a value out of its range or a shape that does not fit."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = str(frame.f_globals.get("__name__", ""))
    return isinstance(error, (TypeError, ValueError)) and module.split(".")[0] == "elva_kernels"


HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of what moves, hides or turns other text: controls (ESC, DEL, C1), bidi and
zero-width marks, halves of surrogate pairs, separators of lines."""

JOINERS = "\u200c\u200d"
"""They spell words of some scripts and compose emoji; next to a letter of ASCII they only hide."""


def counted(count: int, one: str, many: str = "") -> str:
    """`1 picture`, `2,000 pictures`.

    Args:
        many: the plural; with an s for "".
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def printable(text: str, keep: str = "") -> str:
    r"""The text with every hidden character as its escape: `\n`, `\x1b`, `\u202e`.

    Args:
        keep: characters that stay as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    shown = []
    for before, letter in zip(" " + text, text, strict=False):
        joins = letter in JOINERS and not before.isascii()
        if unicodedata.category(letter) not in HIDDEN or letter in keep or joins:
            shown.append(letter)
        elif "\udc80" <= letter <= "\udcff":  # a byte of a file's name that is no UTF-8
            shown.append(f"\\x{ord(letter) - 0xDC00:02x}")
        else:
            shown.append(letter.encode("unicode_escape").decode())
    return "".join(shown)
