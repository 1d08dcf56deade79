const MAX_CELLS = 4_000_000;
const WORDS = /<\/?\w+>|\s+|[\p{L}\p{N}]+|[^\s\p{L}\p{N}]/gu;

/**
 * What turns `before` into `after`, word by word.
 *
 * The longest common subsequence of words; what lies between equal beginnings and ends alone is
 * compared. Returns runs of ["same" | "gone" | "new", text]; null where both are too long.
 */
export function differences(before, after) {
  const a = before.match(WORDS) ?? [];
  const b = after.match(WORDS) ?? [];
  let start = 0;
  while (start < Math.min(a.length, b.length) && a[start] === b[start]) start += 1;
  let [endA, endB] = [a.length, b.length];
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) [endA, endB] = [endA - 1, endB - 1];
  const [rows, columns] = [endA - start, endB - start];
  if (rows * columns > MAX_CELLS) return null;

  // lengths[i][j]: the longest common subsequence of a from i and b from j on.
  const width = columns + 1;
  const lengths = new Uint16Array((rows + 1) * width);
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = columns - 1; j >= 0; j -= 1) {
      lengths[i * width + j] =
        a[start + i] === b[start + j]
          ? lengths[(i + 1) * width + j + 1] + 1
          : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    }
  }
  const runs = [];
  const add = (kind, text) => {
    if (runs.at(-1)?.[0] === kind) runs.at(-1)[1] += text;
    else if (text) runs.push([kind, text]);
  };
  add("same", a.slice(0, start).join(""));
  let [i, j] = [0, 0];
  while (i < rows || j < columns) {
    if (i < rows && j < columns && a[start + i] === b[start + j]) {
      add("same", a[start + i]);
      [i, j] = [i + 1, j + 1];
    } else if (i < rows && (j === columns || lengths[(i + 1) * width + j] >= lengths[i * width + j + 1])) {
      add("gone", a[start + i]);
      i += 1;
    } else {
      add("new", b[start + j]);
      j += 1;
    }
  }
  add("same", a.slice(endA).join(""));
  return runs;
}
