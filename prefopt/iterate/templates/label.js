"use strict";
// Texts enter the page by textContent alone: what a model wrote is never markup.
const find = (id) => document.getElementById(id);
const { key, rows } = JSON.parse(find("content").textContent);
let votes = {};
try { votes = JSON.parse(localStorage.getItem(key)) || {}; } catch { /* storage is off: votes live as long as the page */ }
const firstOpen = () => rows.findIndex((row) => !(row.id in votes));
let place = Math.max(0, firstOpen());

function fill(box, text) {
  box.replaceChildren();
  const turns = typeof text === "string" ? [{ content: text }] : text;
  for (const turn of turns) {
    if (turn.role) {
      const role = document.createElement("div");
      role.className = "role";
      role.textContent = turn.role;
      box.append(role);
    }
    const body = document.createElement("div");
    body.textContent = turn.content || "(empty)";
    box.append(body);
  }
}

function show() {
  const row = rows[place], voted = votes[row.id], cast = Object.keys(votes).length;
  fill(find("prompt"), row.prompt);
  fill(find("left"), row.completions[row.left]);
  fill(find("right"), row.completions[1 - row.left]);
  const pressed = { left: row.left, right: 1 - row.left, tie: "tie" };
  for (const side of Object.keys(pressed)) find("vote-" + side).setAttribute("aria-pressed", String(voted === pressed[side]));
  find("place").textContent = `${place + 1} of ${rows.length}`;
  find("count").textContent = `${cast} voted on`;
  find("progress").value = cast;
  find("done").textContent = cast === rows.length ? "All are voted on: save the votes." : "";
}

function move(step) {
  place = Math.min(rows.length - 1, Math.max(0, place + step));
  show();
}

function vote(preferred) {
  votes[rows[place].id] = preferred;
  try { localStorage.setItem(key, JSON.stringify(votes)); } catch { /* as above */ }
  move(1);
}

function save() {
  const lines = rows.filter((row) => row.id in votes)
    .map((row) => JSON.stringify({ id: row.id, preferred: votes[row.id], left: row.left }) + "\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/x-ndjson" }));
  link.download = find("save").dataset.file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const actions = {
  "vote-left": () => vote(rows[place].left), "vote-right": () => vote(1 - rows[place].left), "vote-tie": () => vote("tie"),
  back: () => move(-1), next: () => move(1), save,
};
for (const id of Object.keys(actions)) find(id).addEventListener("click", actions[id]);
const keys = { 1: "vote-left", 2: "vote-right", t: "vote-tie", ArrowLeft: "back", ArrowRight: "next" };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
  event.preventDefault();
  actions[keys[event.key]]();
});
show();
