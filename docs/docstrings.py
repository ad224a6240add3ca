"""Makes Markdown of docstrings: the star of y*(x) is no emphasis, examples are code."""

import re

from griffe import Extension


class Docstrings(Extension):
    """Rewrites every docstring before it is rendered."""

    def on_instance(self, *, obj, **_):
        """Change the docstring of an object."""
        if obj.docstring:
            text = re.sub(r"(?<=[A-Za-z])\*(?!\*)", "∗", obj.docstring.value)
            obj.docstring.value = re.sub(
                r"^>>> .*(?:\n.+)*", r"```pycon\n\g<0>\n```", text, flags=re.MULTILINE
            )
