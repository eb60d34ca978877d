"""Running a model: open it, generate, chat."""

from pliant.run.chat import Chat
from pliant.run.generate import Memory, Usage, generate_tokens, stream
from pliant.run.live import RunningModel, load
from pliant.run.sampling import Sampler

__all__ = [
    "Chat",
    "Memory",
    "RunningModel",
    "Sampler",
    "Usage",
    "generate_tokens",
    "load",
    "stream",
]
