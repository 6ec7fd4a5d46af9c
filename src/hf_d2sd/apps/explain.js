for (const button of document.querySelectorAll("button[data-open]")) {
  button.addEventListener("click", () => {
    for (const cycle of document.querySelectorAll("details.cycle")) cycle.open = Boolean(button.dataset.open);
  });
}
const reveal = () => {
  const cycle = location.hash.startsWith("#cycle-") && document.getElementById(location.hash.slice(1));
  if (!cycle) return;
  cycle.open = true;
  cycle.scrollIntoView();
};
addEventListener("hashchange", reveal);
reveal();
