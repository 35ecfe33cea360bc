#!/usr/bin/env bash
# Installs jaxblock and trains, scores and exports a small diffusion LM: launch/quickstart.sh [--control] [--out FOLDER]
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'HELP'
usage: launch/quickstart.sh [--control] [--short] [--out FOLDER]

Installs jaxblock into .venv and runs `jaxblock quickstart`, which prepares the built-in arithmetic word problems; pre-trains a
small diffusion LM the classical way; scores it on held-out problems; fine-tunes it with Blockwise SFT; scores it again; exports
it as a Hugging Face checkpoint. What is done already is skipped, and a training run that was interrupted goes on where it
stopped.

  --control      also spend the fine-tuning's FLOPs on more classical training from the same start, and score that
  --short        cut every stage to a few steps: only shows that the installation works
  --out FOLDER   where everything goes (default, in the repository: data in prepared/quickstart, all else in
                 runs/quickstart, as the configs have it)

Environment:
  PYTHON         interpreter to make .venv from (3.11 or newer)
HELP
}

control=no short=no takes_command=no out=''
read_options --out '--control --short' "$@"

arguments=()
if [ -n "$out" ]; then arguments+=(--out "$out"); else cd "$root"; fi
if [ "$control" = yes ]; then arguments+=(--control); fi
if [ "$short" = yes ]; then arguments+=(--short); fi

install_environment ""
# Python looks for modules in the current folder as well, unless -P forbids it.
"$venv_python" -P -m jaxblock quickstart ${arguments[@]+"${arguments[@]}"}
say "" "The command jaxblock is in .venv: source $(quote "$venv/bin/activate")"
