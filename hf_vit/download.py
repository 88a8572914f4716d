"""Download a file from a URL, with limits of time and size: for images given by URL.

Not huggingface_hub's `http_get`: it limits neither the size of a file nor the total time.
"""

import re
import time
import urllib.request
from http.client import HTTPException
from urllib.parse import quote


ADDRESS = re.compile(r"https?://", re.IGNORECASE)
MAX_SECONDS, MAX_BYTES = 30, 64 << 20  # of one file in total: also for a server that sends a byte now and then
CHUNK = 1 << 16  # bytes
UNQUOTED = "%/:=&?~#+!$,;'@()*[]"  # in a URL; other characters, such as letters with accents, are escaped


def is_address(text: object) -> bool:
    """Whether it is a URL, not a path."""
    return isinstance(text, str) and ADDRESS.match(text) is not None


def download(address: str) -> bytes:
    """The content of an `http://` or `https://` URL.

    Raises:
        OSError: with the reason: no such host, 404, too slow, too large.
    """
    # some servers refuse Python's own User-Agent
    request = urllib.request.Request(quote(address, safe=UNQUOTED), headers={"User-Agent": "hf-vit"})
    ends = time.monotonic() + MAX_SECONDS
    content = bytearray()
    try:
        with urllib.request.urlopen(request, timeout=MAX_SECONDS) as response:
            while chunk := response.read1(CHUNK):
                content += chunk
                if len(content) > MAX_BYTES:
                    raise OSError(f"larger than {MAX_BYTES >> 20} MiB")
                if time.monotonic() > ends:
                    raise OSError(f"not complete after {MAX_SECONDS} s")
            if response.length:  # bytes of Content-Length that did not arrive
                raise OSError("the connection ended before the file did")
    except (HTTPException, ValueError) as error:  # damaged responses; invalid URLs
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from error
    return bytes(content)
