"""What can go wrong, as a tree. Every message names the value and the remedy.

LazyAheadError ├── ConfigError (ValueError)            a setting that cannot mean anything: keep
ratio 1.5, a schedule that grows ├── RequestError (ValueError)           this prompt or option
cannot be served: empty, too long, beam search │   └── ContextLengthError              prompt plus
answer exceed the model's context ├── ModelError                          the model cannot be
loaded, or is not supported │   ├── ModelNotFoundError              no such folder, no network, no
safetensors │   └── UnsupportedModelError           this architecture cannot do what was asked, with
the reason ├── SessionFileError                    a saved session that is damaged or belongs to
another model ├── MemoryFileError                     an answers log that is damaged or belongs to
another model or tokenizer ├── RankError                           a process of a tensor-parallel
group has ended └── OutOfMemoryError                    the device is full; says how much
was needed
"""


class LazyAheadError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(LazyAheadError, ValueError):
    """A setting that cannot mean anything."""


class RequestError(LazyAheadError, ValueError):
    """A prompt or an option that cannot be served."""


class ContextLengthError(RequestError):
    """Prompt plus answer exceed the model's context."""


class ModelError(LazyAheadError):
    """The model cannot be loaded, or is not supported."""


class ModelNotFoundError(ModelError):
    """No such folder or name, or nothing loadable in it."""


class UnsupportedModelError(ModelError):
    """The architecture cannot do what was asked; the message has the reason."""


class SessionFileError(LazyAheadError):
    """A saved session that is damaged, or that belongs to another model or tokenizer."""


class MemoryFileError(LazyAheadError):
    """An answers log that is damaged, or that belongs to another model or tokenizer."""


class RankError(LazyAheadError):
    """A process of a tensor-parallel group has ended, and the group with it."""


class OutOfMemoryError(LazyAheadError):
    """The device is full."""
