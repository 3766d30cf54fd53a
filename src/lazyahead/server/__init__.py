"""An OpenAI-compatible server. Needs the extra `lazyahead[serve]`.

app = create_app(LLM("model"), Settings())      # any ASGI server runs it
"""

from lazyahead.server.app import create_app
from lazyahead.server.settings import Settings

__all__ = ["Settings", "create_app"]
