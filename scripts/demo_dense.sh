#!/usr/bin/env bash
# The dense demo: sets up, makes scenes of photographs, pre-trains a small body with EfficientTrain++, and trains a
# detector and a segmenter on it; predictions drawn on new scenes are in output/demo_dense. Under six minutes on two CPU
# cores, after the installation. It can be interrupted: the same command resumes. Settings given are passed to every
# run: scripts/demo_dense.sh [--epochs N ...]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$ROOT"
data=data/demo_scenes output=output/demo_dense
body=$output/body/checkpoint-last.pth

"$PYTHON" scripts/demo_data.py data/demo --val 100
"$PYTHON" scripts/demo_scenes.py "$data"
echo "a body: EfficientTrain++ on single photographs"
"$PYTHON" main.py --recipe recipes/demo.yaml --data_path data/demo --output_dir $output/body "$@"
for task in detection segmentation; do
    echo "$task, from that body"
    "$PYTHON" main.py --recipe recipes/demo_$task.yaml --data_path $data --output_dir $output/$task --finetune $body "$@"
    "$PYTHON" main.py --predict "$data/images/validation/000[1-8].jpg" --resume $output/$task/checkpoint-last.pth \
        --predict_to $output/$task/predictions --pictures true
done
echo "reports: $output/detection/report.html and $output/segmentation/report.html"
echo "predictions: $output/detection/predictions/pictures and $output/segmentation/predictions/pictures"
