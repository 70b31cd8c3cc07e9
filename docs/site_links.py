"""For the site alone: links from the pages to files beside docs/, which a site does not have."""

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Links to such a file lead to the repository, where its address is known, or else name it."""

    def replaced(link: re.Match[str]) -> str:
        text, path = link.groups()
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        return text if path in text else f"{text} (`{path}` in the repository)"

    return OUTSIDE.sub(replaced, markdown)
