"""Test `echod completion` in real shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Command

pytestmark = pytest.mark.once

# The last word of each line has one completion.
COMPLETIONS = {
    "echod comp": "completion",
    "echod --log.level d": "debug",
    "echod serve 127.0.0.1:1 --limits.idle": "--limits.idle-timeout",
    "echod check --config ech": "echo.toml",
    "echod config --log.file ech": "echo.toml",
    "echod completion f": "fish",
    "echod help con": "config",
    "echod probe localhost:1 --pipe": "--pipeline",
    "echod probe localhost:1 --tls --ca ech": "echo.toml",
    "echod probe udp:localhost:1 --max": "--max-loss",
}

# Each script gets the file of completions and the lines. It prints the completed word of each line.
BASH = r"""
source "$1"
[[ $(complete -p echod) =~ -F\ ([^ ]+) ]] && function=${BASH_REMATCH[1]}
for line in "${@:2}"; do
    read -ra COMP_WORDS <<<"$line"
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    "$function" echod "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
    echo "${COMPREPLY[*]}"
done
"""
FISH = r"""
source $argv[2]
for line in $argv[3..]
    complete -C $line | string replace --regex '\t.*' ''
end
"""
# zsh completes only on a terminal, which zpty is. After a tab, the key ^G prints the line.
ZSH = r"""
zmodload zsh/zpty
zpty shell zsh -f
zpty -w shell "fpath+=(${1:h}); autoload -Uz compinit; compinit -D -u"
zpty -w shell 'show() { print -r -- "<$BUFFER>"; BUFFER= }; zle -N show; bindkey "^G" show; print REA""DY'
zpty -r -m shell output '*READY*'
for line in "${@:2}"; do
    zpty -w -n shell "$line"$'\t\a'
    zpty -r -m shell output '*<*>*'
    words=(${=${output##*<}%%>*})
    print -r -- $words[-1]
done
"""


@pytest.mark.parametrize(("shell", "program"), [("bash", BASH), ("fish", FISH), ("zsh", ZSH)])
def test_completion(command: Command, shell: str, program: str, tmp_path: Path) -> None:
    """A shell completes commands, options, values and file names, also those of `probe`."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    result = command("completion", shell)
    assert (result.returncode, result.stderr) == (0, "")
    file = tmp_path / "_echod"  # the name that zsh looks for
    file.write_text(result.stdout)
    (tmp_path / "echo.toml").touch()
    completed = subprocess.run(
        [shell, "-c", program, shell, str(file), *COMPLETIONS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        # Without the tester's own startup files, which XDG_CONFIG_HOME and ZDOTDIR may name, and locale.
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "dumb"},
    )
    assert completed.stderr == ""
    assert dict(zip(COMPLETIONS, completed.stdout.split(), strict=True)) == COMPLETIONS


def test_other_shells(command: Command) -> None:
    result = command("completion", "tcsh")
    assert (result.returncode, result.stdout) == (2, "")
    assert "echod completion: error: argument shell: invalid choice: 'tcsh' (choose from" in result.stderr


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("shtab", f"echod: completion needs shtab, which is not installed: {sys.executable} -m pip install shtab\n"),
        ("echod.settings.parser", "ModuleNotFoundError: import of echod.settings.parser halted; None in sys.modules\n"),
    ],
)
def test_without_a_module(module: str, message: str) -> None:
    """If shtab is not installed, the error says so. Without another module, the installation is broken."""
    code = "import sys; sys.modules[sys.argv.pop(1)] = None; from echod.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, module, "completion", "bash"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.endswith(message)
