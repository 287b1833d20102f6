// Keeps a page current: events of jobs → the page once more → its [data-live] elements in place of the old ones.
// Without this script the page is whole, and reloads by itself while jobs run.
"use strict";

const PAUSE = 1000; // milliseconds between two looks
const PATIENCE = 10000; // milliseconds until a refused stream is asked for again
const KINDS = ["queued", "started", "progress", "resumed", "cancelling", "ended"];
let source, timer, looked = 0, last = document.body.dataset.after;

function connect() {
  if (source || document.hidden || !document.body.dataset.events) return;
  const url = new URL(document.body.dataset.events, location.href);
  url.searchParams.set("after", last);
  source = new EventSource(url); // after a break it goes on by itself, with the number of its last event
  for (const kind of KINDS) source.addEventListener(kind, told);
  source.addEventListener("error", () => { // refused for good: the server is full, or the session is over
    if (source?.readyState !== EventSource.CLOSED) return;
    disconnect();
    setTimeout(() => { refresh(); connect(); }, PATIENCE);
  });
}

function disconnect() { // a browser has six connections to a server: tabs that nobody sees take none
  source?.close();
  source = undefined;
}

function told(event) {
  last = event.lastEventId;
  if (event.type === "started" || event.type === "ended") {
    const { job, data } = JSON.parse(event.data);
    document.getElementById("announcement").textContent = `Job ${job}: ${data.state ?? "running"}`;
  }
  const wait = Math.max(0, looked + PAUSE - Date.now()) + Math.random() * PAUSE; // not all who hear it at once
  timer ??= setTimeout(refresh, wait);
}

async function refresh() {
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (answer.redirected) location.assign(answer.url); // the session is over
    else if (answer.ok) replace(new DOMParser().parseFromString(await answer.text(), "text/html"));
  } catch (error) {
    console.warn(`not refreshed: ${error.message}`); // the next event tries again
  } finally {
    looked = Date.now();
    timer = undefined;
  }
}

function replace(page) {
  document.title = page.title;
  for (const old of document.querySelectorAll("[data-live][id]")) {
    const fresh = page.getElementById(old.id);
    if (!fresh || fresh.outerHTML === old.outerHTML) continue;
    if (old.contains(document.activeElement) && old.querySelector("input:focus, select:focus, textarea:focus")) continue;
    const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
    const open = [...old.querySelectorAll("details[open][id]")].map((details) => details.id);
    const scrolled = [...old.querySelectorAll(".log, .scroll")].map((box) => [box.scrollLeft, box.scrollTop]);
    old.replaceWith(document.adoptNode(fresh));
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    fresh.querySelectorAll(".log, .scroll").forEach((box, i) => { [box.scrollLeft, box.scrollTop] = scrolled[i] ?? [0, 0]; });
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  }
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) return disconnect();
  refresh();
  connect();
});
addEventListener("pagehide", disconnect);
addEventListener("pageshow", (event) => { if (event.persisted) { refresh(); connect(); } });
connect();
