"""Docstrings are written with Sphinx's roles and links, which editors show; the site wants Markdown's."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(func|class|meth|mod):`([^`]+)`")
LINK = re.compile(r"`([^`<]+?)\s*<(https?://[^>\s]+)>`_+")


class Markdown(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **arguments: Any) -> None:
        def reference(match: re.Match[str]) -> str:
            role, name = match.groups()
            if name.startswith("torch"):
                return f"`{name}`"
            # A class's own methods may be inherited ones, which a search by scope does not find.
            path = f"{obj.path}.{name}" if role == "meth" and obj.is_class else name
            return f"[`{name}`][{path}]"

        if obj.docstring is not None:
            obj.docstring.value = LINK.sub(r"[\1](\2)", ROLE.sub(reference, obj.docstring.value))
