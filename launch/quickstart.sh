#!/usr/bin/env bash
# Installs jaxblock and trains, scores and exports a small diffusion LM: launch/quickstart.sh [--control] [--out FOLDER]
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'HELP'
usage: launch/quickstart.sh [--control] [--out FOLDER]

Installs jaxblock into .venv, then: prepares the built-in arithmetic word problems; pre-trains a small diffusion LM the
classical way; scores it on held-out problems; fine-tunes it with Blockwise SFT; scores it again; exports it as a Hugging
Face checkpoint. What is done already is skipped, and a training run that was interrupted goes on where it stopped.

  --control      also spend the fine-tuning's FLOPs on more classical training from the same start, and score that
  --out FOLDER   where everything goes (default, in the repository: data in prepared/quickstart, all else in
                 runs/quickstart, as the configs have it)

Environment:
  PYTHON         interpreter to make .venv from (3.11 or newer)
HELP
}

control=no takes_command=no
out="$root/runs/quickstart" data="$root/prepared/quickstart"
# shellcheck disable=SC2317,SC2329  # called by read_options
take_out() { out="$1" data="$1/prepared"; }
read_options --out --control "$@"

install_environment ""
mkdir -p "$out" "$data" 2>/dev/null || fail "cannot make the folders $out and $data: choose another with --out"
out="$(cd "$out" && pwd)"
data="$(cd "$data" && pwd)"
rmdir "$data" 2>/dev/null || true # if it is empty, it was made only to find its absolute path, and prepare makes it
record="$out/phases.jsonl"
classical="$root/configs/quickstart_classical.yaml"
blockwise="$root/configs/quickstart_blockwise.yaml"
prepared=(--data.prepared "$data")

# phase NAME VERB ARGUMENTS...: runs one verb of jaxblock and records its wall time and peak memory under NAME.
phase() {
    local name="$1" code=0
    shift
    say "" "== $name"
    "$venv_python" "$root/launch/phases.py" run "$record" "$name" "$venv_python" -m jaxblock "$@" || code=$?
    if [ "$code" -ne 0 ]; then
        say "" "quickstart: '$name' ended with exit code $code. The same command goes on from here: $0" >&2
        exit "$code"
    fi
}

# score NAME RUN FOLDER ARGUMENTS...: evaluates RUN into FOLDER, always with the same decoder settings, so that scores can be
# compared.
score() {
    local name="$1" run="$2" folder="$3"
    shift 3
    if [ -f "$folder/summary.json" ] && [ -z "$(find "$run" -type f -newer "$folder/summary.json" | head -n 1)" ]; then
        say "" "== $name" "done already: $folder"
        return
    fi
    # What is there was left by an interrupted call, or is older than the run that it scored.
    rm -f "$folder/summary.json" "$folder/problems.jsonl"
    phase "$name" evaluate --config "$blockwise" --checkpoint "$run" --out "$folder" "${prepared[@]}" "$@"
}

phase prepare prepare --config "$classical" "${prepared[@]}"
phase "train, classical" train --config "$classical" "${prepared[@]}" --train.out "$out/classical"
score "score before" "$out/classical" "$out/score_before"
phase "train, blockwise" train --config "$blockwise" "${prepared[@]}" --train.out "$out/blockwise" \
    --model.init_from "$out/classical"
score "score after" "$out/blockwise" "$out/score_after" --evaluate.compare "$out/score_before/problems.jsonl"
if [ "$control" = yes ]; then
    phase "train, control" train --config "$root/configs/quickstart_control.yaml" "${prepared[@]}" \
        --train.out "$out/control" --model.init_from "$out/classical"
    score "score control" "$out/control" "$out/score_control" --evaluate.compare "$out/score_after/problems.jsonl"
fi
if [ ! -f "$out/export/config.json" ]; then
    phase export export --checkpoint "$out/blockwise" --out "$out/export"
elif [ -n "$(find "$out/blockwise" -type f -newer "$out/export/config.json" | head -n 1)" ]; then
    say "" "$out/export is older than the run: it is replaced once the new export is whole"
    phase export export --checkpoint "$out/blockwise" --out "$out/export" --overwrite
else
    say "" "== export" "done already: $out/export"
fi

say "" "== result"
"$venv_python" "$root/launch/phases.py" report "$record" \
    "before (classical):         =$out/score_before/summary.json" \
    "after (Blockwise SFT):      =$out/score_after/summary.json" \
    "control (more classical):   =$out/score_control/summary.json"
cat <<DONE

$data: the data as tokens, the tokenizer, a manifest of what was kept
$out:
  classical/, blockwise/   the runs: checkpoints, metrics.jsonl, plots/
  score_*/                 each problem's answer and verdict, and a summary
  export/                  the Hugging Face checkpoint
  phases.jsonl             time and memory of every phase

Try next:
  source $(quote "$venv/bin/activate")
  # what the model sees in training, and which tokens carry loss
  jaxblock inspect --config $(quote_all "$blockwise" "${prepared[@]}")
  # watch it decode, block by block
  jaxblock decode --checkpoint $(quote "$out/blockwise") --watch "Zoe keeps 9 keys. Zoe buys 5 more. Diego borrows 6 keys. How many keys are there now?"
  # every setting; your own JSONL goes in data.train
  jaxblock train --help-all
DONE
if [ "$control" = no ]; then
    say "  # would as much classical training have done as well?" "  launch/quickstart.sh --control"
fi
