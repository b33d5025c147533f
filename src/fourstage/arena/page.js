// Keys of the voting tab: arrows, t, b, n (next), u (undo). Not while somebody types, and arrows
// not where they have a meaning of their own: on tabs, numbers and sliders.
const KEYS = {
  ArrowLeft: "vote-left", ArrowRight: "vote-right", t: "vote-tie", b: "vote-both_bad",
  n: "draw", u: "undo",
};
const TYPED = "textarea, select, [contenteditable], input:not([type=checkbox]):not([type=range])";
const OWN_ARROWS = "input:not([type=checkbox]), [role=tab], [role=slider]";
document.addEventListener("keydown", (event) => {
  const at = event.target instanceof Element ? event.target : document.body;
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || at.closest(TYPED)) return;
  if (event.key.startsWith("Arrow") && at.closest(OWN_ARROWS)) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const button = document.getElementById(KEYS[key]);
  if (button && button.offsetParent !== null) {
    event.preventDefault();
    button.focus({ preventScroll: true }); // from the tab that was clicked, which has own arrows
    button.click();
  }
});
// A question that was asked is selected: typing replaces it.
document.addEventListener("keydown", (event) => {
  const isField = event.target instanceof Element && event.target.closest("#question textarea");
  if (isField && event.key === "Enter" && !event.shiftKey && !event.isComposing)
    setTimeout(() => event.target.select(), 0);
});
