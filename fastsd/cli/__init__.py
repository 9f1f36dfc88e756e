"""The `fastsd` command: verbs found by entry point, results on stdout, errors as one line on stderr.

A verb is a function that `typer` can read, registered in the entry-point group `fastsd.verbs` by whichever package
holds what it drives. Exit codes: 0 success, 2 bad input, 1 anything else; `--debug` anywhere shows the traceback.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer

import fastsd
from fastsd.errors import InputError, MissingExtraError, NumericError

# The one of click's usage errors that typer re-exports under every version (newer ones carry their own click).
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]

INTERRUPTED = 130  # what newer versions of typer make of Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (by default the process's own) and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    arguments = [one for one in arguments if one != "--debug"]
    warnings.showwarning = _show_warning
    try:
        code = int(_app(arguments)(args=arguments, prog_name="fastsd", standalone_mode=False) or 0)
        return _fail("interrupted", 1, debug) if code == INTERRUPTED else code
    except (InputError, MissingExtraError, NumericError) as error:
        return _fail(str(error), 2 if isinstance(error, InputError) else 1, debug)
    except USAGE_ERROR as error:
        usage: Any = error
        hint = f" (see {usage.ctx.command_path} --help)" if usage.ctx else ""
        return _fail(usage.format_message().rstrip(".") + hint, 2, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 1, debug)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has left; nothing more can be said
        return 1
    except Exception as error:
        return _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"fastsd: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if category is UserWarning:  # ours; what libraries deprecate is no news to whoever makes an image
        print(f"fastsd: warning: {message}", file=sys.stderr)


def _app(arguments: list[str]) -> Any:
    verbs = {entry.name: entry for entry in entry_points(group="fastsd.verbs")}
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    @app.callback(invoke_without_command=True)
    def fastsd_(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    ) -> None:
        """Latent diffusion, as fast as the machine allows. `--debug` anywhere shows tracebacks."""
        if version:
            print(fastsd.__version__)
        elif context.invoked_subcommand is None:
            print(context.get_help())

    # Only the verb that is asked for is imported; for help or a typing error, all of them.
    wanted = next((one for one in arguments if not one.startswith("-")), None)
    for name, entry in sorted(verbs.items()):
        if wanted not in verbs or wanted == name:
            app.command(name)(entry.load())
    return typer.main.get_command(app)
