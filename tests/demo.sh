#!/bin/sh
# The three scripts on a small synthetic corpus, start to end: sh tests/demo.sh
set -e
set -- requirements.txt
. "$(dirname "$0")/setup.sh"
out=demo_output
rm -rf "$out"
mkdir "$out"

echo "== 1 of 5: a dozen synthetic clips, answered by the trained model that comes with the project"
"$python" tests/tools/synthetic_corpus.py --output_dir "$out/dozen" --actors 2 --takes 1
"$python" custom2_tester.py --input_dir "$out/dozen" --output_dir "$out/answers" --visualize

echo "== 2 of 5: more synthetic voices, to train on"
"$python" tests/tools/synthetic_corpus.py --output_dir "$out/wavs" --actors 16 --takes 6

echo "== 3 of 5: spectrograms (mel_generator.py)"
"$python" mel_generator.py --input_dir "$out/wavs" --output_dir "$out/mel_spectrograms" \
    --n_augmentations 2

echo "== 4 of 5: training (cremad_custom2.py)"
# The trainer with constants that a laptop bears; edit yours in cremad_custom2.py itself.
sed -e "s|^MEL_DIR = .*|MEL_DIR = \"$out/mel_spectrograms\"|" \
    -e "s|^OUTPUT_DIR = .*|OUTPUT_DIR = \"$out/output\"|" \
    -e 's/^CHANNELS = .*/CHANNELS = (16, 32, 48, 64)/' \
    -e 's/^HIDDEN = .*/HIDDEN = 128/' \
    -e 's/^BATCH_SIZE = .*/BATCH_SIZE = 32/' \
    -e 's/^EPOCHS = .*/EPOCHS = 12/' \
    cremad_custom2.py > "$out/cremad_custom2.py"
"$python" "$out/cremad_custom2.py"

echo "== 5 of 5: classifying (custom2_tester.py)"
# Voices that the trainer never heard: the test actors of its split.
mkdir "$out/unheard"
grep ',test$' "$out/output/split.csv" | cut -d, -f1 | while read -r stem; do
    cp "$out/wavs/$stem.wav" "$out/unheard/"
done
"$python" custom2_tester.py --input_dir "$out/unheard" --output_dir "$out/results" \
    --model_path "$out/output/best_model.pth" --visualize

echo
echo "These voices are synthetic: the figures show that the scripts work, nothing about people."
echo "Files:"
ls "$out"/output/*.pth "$out"/output/*.png "$out"/results/*.csv "$out"/results/*.png
n=$(find "$out/results/mel_spectrograms" -name '*.png' | wc -l | tr -d ' ')
echo "$out/results/mel_spectrograms/: a picture for each of $n files"
echo "Pages to look and listen through: $out/answers/report.html $out/results/report.html"
