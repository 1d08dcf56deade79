/** Whether the page was served by `care-train report --watch`: its blocks are then fetched. */
export const isLive = document.documentElement.dataset.live === "true";

const MAX_KEPT = 24;
const kept = new Map();

async function packed(name) {
  if (isLive) {
    const response = await fetch(`block/${name}`, { cache: "no-store" });
    if (!response.ok) throw new Error(`${name}: the server answered ${response.status}`);
    return response.body;
  }
  const text = atob(document.getElementById(`block-${name}`).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  return new Blob([bytes]).stream();
}

/** A block of the page's data, unpacked now. */
export async function readBlock(name) {
  const stream = (await packed(name)).pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

/** `readBlock`, remembering the latest few. */
export function keptBlock(name) {
  const found = kept.get(name) ?? readBlock(name);
  kept.delete(name);
  kept.set(name, found);
  if (kept.size > MAX_KEPT) kept.delete(kept.keys().next().value);
  return found;
}

/** Forget what is remembered: the server may have newer blocks of the same names. */
export function forgetBlocks() {
  kept.clear();
}

/** What changes when the server has newer data. */
export async function dataVersion() {
  return (await fetch("version", { cache: "no-store" })).text();
}
