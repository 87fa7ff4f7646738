"""Errors in the words of the command line: the library speaks of keywords, people here have options.

It is done on the text because one error may name several keywords, in the problem and in the remedy, so an attribute
with one name would not do. Only what is listed below is replaced: names that are no English words wherever they stand
outside paths, the others only as the subject that an error begins with.
"""

from __future__ import annotations

import re

from isthmus.protocol.errors import BundleError, IsthmusError, ModelError

_KEYWORDS = re.compile(
    r"(?<![\w/.'-])(expert_bits|expert_mb|flash_mb_s|kv_format|kv_share|kv_tokens|max_disagreement|max_sessions|max_tokens|memory_mb|top_k|top_p)(?![\w/.'-])"
)
_SUBJECT = re.compile(r"(codec|cut|kv|mode|overflow|prefer|seed|temperature|threads)(?= is )")


def worded(error: IsthmusError, *, chatting: bool = False) -> str:
    """An error's text with option names in place of keywords; in a chat also with what can be typed there."""
    if isinstance(error, BundleError | ModelError):  # these speak of fields in files
        return str(error)
    text = _SUBJECT.sub(_option, str(error)) if _SUBJECT.match(str(error)) else str(error)
    text = _KEYWORDS.sub(
        _option, text.replace("overflow='slide'", "--overflow slide").replace("model='...'", "--model")
    )
    if chatting:
        text = text.replace("begin a new one,", "begin a new one (/new),")
        text = text.replace("begin a new conversation,", "begin a new conversation (/new),")
    return text


def _option(match: re.Match[str]) -> str:
    return "--" + match[1].replace("_", "-")
