"""A file from an address, within a time and a size: for images given by URL.

Not huggingface_hub's `http_get`: it limits neither the size of a file nor the time for all of it.
"""

import re
import time
import urllib.request
from http.client import HTTPException
from urllib.parse import quote


ADDRESS = re.compile(r"https?://", re.IGNORECASE)
MAX_SECONDS, MAX_BYTES = 30, 64 << 20  # of one file; a server that sends a byte now and then ends with these, too
CHUNK = 1 << 16  # bytes
UNQUOTED = "%/:=&?~#+!$,;'@()*[]"  # in an address; other characters, such as letters with accents, are escaped


def is_address(text: object) -> bool:
    """Whether it is an address, and no path."""
    return isinstance(text, str) and ADDRESS.match(text) is not None


def download(address: str) -> bytes:
    """The content behind an `http://` or `https://` address.

    Raises:
        OSError: with the reason why there is none: no such host, 404, too slow, too large.
    """
    # Some servers refuse Python's own User-Agent
    request = urllib.request.Request(quote(address, safe=UNQUOTED), headers={"User-Agent": "hf-vit"})
    ends = time.monotonic() + MAX_SECONDS
    content = bytearray()
    try:
        with urllib.request.urlopen(request, timeout=MAX_SECONDS) as answer:
            while chunk := answer.read1(CHUNK):
                content += chunk
                if len(content) > MAX_BYTES:
                    raise OSError(f"larger than {MAX_BYTES >> 20} MiB")
                if time.monotonic() > ends:
                    raise OSError(f"not complete after {MAX_SECONDS} s")
            if answer.length:  # what the server promised and did not send
                raise OSError("the connection ended before the file did")
    except (HTTPException, ValueError) as error:  # damaged answers; addresses that are none
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from error
    return bytes(content)
