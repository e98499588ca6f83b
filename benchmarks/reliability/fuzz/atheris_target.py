"""atheris on one reader: READER, a folder for its files, and libFuzzer's options.

It begins with the reader's own files; an input is a file's number and what stands in it. A script,
since what it measures must not be imported before.
"""

import sys
from pathlib import Path

import atheris

MEASURED = ["elva.data", "elva.evaluation", "elva.recipe", "elva.recipes", "elva.settings"]


def main() -> None:
    """Reads what libFuzzer makes of a reader's files until it has made enough."""
    name, scratch, *options = sys.argv[1:]
    with atheris.instrument_imports(include=MEASURED):
        from benchmarks.reliability.fuzz import files
        from benchmarks.reliability.fuzz.readers import READERS
    folder = files.Folder(READERS[name], Path(scratch) / name)
    paths, corpus = list(folder.files), Path(scratch) / "corpus"
    corpus.mkdir()
    for number, path in enumerate(paths):
        (corpus / str(number)).write_bytes(bytes([number]) + folder.files[path])

    def one(content: bytes) -> None:
        if content:
            folder.read(paths[content[0] % len(paths)], content[1:])

    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    with files.small_pictures():
        atheris.Fuzz()


if __name__ == "__main__":
    main()
