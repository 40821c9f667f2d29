#!/bin/sh
# The three scripts on a small synthetic corpus, start to end: sh tests/demo.sh
set -e
set -- requirements.txt
. "$(dirname "$0")/setup.sh"
out=demo_output
rm -rf "$out"
mkdir "$out"
.venv/bin/python tests/synthetic_corpus.py --output_dir "$out/wavs" --actors 16 --takes 6
.venv/bin/python mel_generator.py --input_dir "$out/wavs" --output_dir "$out/mel_spectrograms" --n_augmentations 2
# The same trainer with constants that a laptop bears; edit yours in cremad_custom2.py itself.
sed -e "s|^MEL_DIR = .*|MEL_DIR = \"$out/mel_spectrograms\"|" -e "s|^OUTPUT_DIR = .*|OUTPUT_DIR = \"$out/output\"|" \
    -e 's/^CHANNELS = .*/CHANNELS = (16, 32, 48, 64)/' -e 's/^HIDDEN = .*/HIDDEN = 128/' -e 's/^EPOCHS = .*/EPOCHS = 12/' \
    -e 's/^BATCH_SIZE = .*/BATCH_SIZE = 32/' cremad_custom2.py > "$out/cremad_custom2.py"
.venv/bin/python "$out/cremad_custom2.py"
# Classify voices that the trainer never heard: the test actors of its split.
mkdir "$out/unheard"
grep ',test$' "$out/output/split.csv" | cut -d, -f1 | while read -r stem; do cp "$out/wavs/$stem.wav" "$out/unheard/"; done
.venv/bin/python custom2_tester.py --input_dir "$out/unheard" --model_path "$out/output/best_model.pth" --output_dir "$out/results" --visualize
echo
echo "These voices are synthetic: the figures say that all three scripts work, nothing about people."
ls "$out"/output/*.png "$out"/results/*.png
echo "$out/results/mel_spectrograms: a picture for each of $(ls "$out/unheard" | wc -l | tr -d ' ') files"
