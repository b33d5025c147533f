// Keys of the voting tab: arrows, t, b, n (next), u (undo), when no field is being typed in.
const KEYS = {
  ArrowLeft: "vote-left", ArrowRight: "vote-right", t: "vote-tie", b: "vote-both_bad",
  n: "draw", u: "undo",
};
document.addEventListener("keydown", (event) => {
  const field = event.target.closest("input, textarea, select, [contenteditable], [role=slider]");
  if (field || event.ctrlKey || event.metaKey || event.altKey) return;
  const button = document.getElementById(KEYS[event.key]);
  if (button && button.offsetParent !== null) {
    event.preventDefault();
    button.click();
  }
});
