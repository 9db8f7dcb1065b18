#!/usr/bin/env bash
# Draw docs/assets/evaluation.png: the report page of the shipped engine on the Grocery Store test images.
#
#     EDGEFG_GROCERY=../shared/data/grocery docs/assets/make_evaluation.sh
#
# Needs edgefg with the extras openvino and report, and Chromium.
set -euo pipefail
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
edgefg evaluate benchmarks/models/grocery-int8/model.xml "$EDGEFG_GROCERY" \
    --split test --report "$out/page.html"
chromium --headless --no-sandbox --hide-scrollbars --window-size=1000,1150 \
    --screenshot="$(dirname "$0")/evaluation.png" "file://$out/page.html"
