"use strict";
// The page as a whole: its address chooses the view; the server is asked every few seconds whether something is new.

/** The view and its parameters in the page's address. */
function readRoute() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const view = Object.hasOwn(Views, path) ? path : "overview";
  return { view, parameters: Object.fromEntries(new URLSearchParams(query)) };
}

const Page = {
  runs: [],
  run: (route) => {
    const run = Number(route.parameters.run ?? 0);
    return Page.runs[run] ? run : 0;
  },
};

(() => {
  const POLL_MS = 2000,
    HIDDEN_MS = 15000,
    LONGEST_MS = 30000;
  const main = document.getElementById("main"),
    head = document.getElementById("head"),
    help = document.getElementById("help");
  const status = el("span", { class: "soft status", role: "status" });
  const THEMES = ["", "light", "dark"];
  const KEYS = [
    ["o", "overview"],
    ["r", "rollouts"],
    ["c", "compare two runs"],
    ["j, k", "next, previous sample"],
    ["Enter", "open"],
    ["← →", "previous, next sample of the group"],
    ["[ ]", "earlier, later step"],
    ["p n", "groups before, after"],
    ["/", "search"],
    ["t", "light, dark, as the system"],
    ["Esc", "back"],
    ["?", "this list"],
  ];
  let request = null,
    shownRoute = "",
    revision = "",
    timer = 0,
    misses = 0;

  async function load(isNew) {
    if (request) request.abort();
    const mine = (request = new AbortController());
    const route = readRoute(),
      name = location.hash;
    main.setAttribute("aria-busy", "true");
    try {
      if (isNew || !Page.runs.length) Page.runs = await Source.get("runs", {}, mine.signal);
      drawHead(route);
      const content = await Views[route.view](route, mine.signal);
      if (mine.signal.aborted) return;
      swap(content, shownRoute === name || (isSameView(shownRoute, name) && document.activeElement?.form));
      shownRoute = name;
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error.isLost) return lost();
      swap(el("p", { class: "bad" }, error.message), false);
      shownRoute = name;
    } finally {
      if (mine === request) main.removeAttribute("aria-busy");
    }
  }

  const isSameView = (one, other) => one.split("?")[0] === other.split("?")[0];

  /** Put a view in place; on the same view scroll position and focus stay. */
  function swap(content, isSame) {
    const scroll = window.scrollY,
      active = document.activeElement;
    const selector = active?.name
      ? `[name="${CSS.escape(active.name)}"]`
      : active?.matches?.("a[href]")
        ? `a[href="${CSS.escape(active.getAttribute("href"))}"]`
        : "";
    const caret = active?.type === "search" ? active.selectionStart : null;
    main.replaceChildren(content);
    main.dataset.address = location.hash;
    if (!isSame) {
      window.scrollTo(0, 0);
      main.focus({ preventScroll: true });
      return;
    }
    window.scrollTo(0, scroll);
    const again = selector && main.querySelector(selector);
    if (!again) return;
    if (active.form && "value" in active && active.value !== again.value) again.value = active.value; // typed meanwhile
    again.focus({ preventScroll: true });
    if (caret !== null) again.setSelectionRange(caret, caret);
  }

  function drawHead(route) {
    const run = Page.run(route);
    const link = (view, text, parameters) =>
      el("a", { href: address(view, parameters), "aria-current": view === route.view ? "page" : null }, text);
    const choice =
      Page.runs.length < 2
        ? null
        : el(
            "select",
            {
              name: "run",
              "aria-label": "run",
              change: (event) => {
                location.hash = address(route.view === "sample" ? "rollouts" : route.view, {
                  run: event.target.value,
                });
              },
            },
            Page.runs.map((one, number) => el("option", { value: number, selected: number === run }, one.name)),
          );
    head.replaceChildren(
      el(
        "nav",
        { class: "line" },
        link("overview", "Overview"),
        link("rollouts", "Rollouts", { run }),
        Page.runs.length > 1 ? link("compare", "Compare", { run: 0, other: 1 }) : null,
        choice,
        el("span", { class: "gap" }),
        status,
        el("button", { type: "button", click: switchTheme, title: "light, dark, as the system (t)" }, "◐"),
        el("button", { type: "button", click: showHelp, title: "keys (?)" }, "?"),
      ),
    );
    document.title = Page.runs.map((one) => one.name).join(" · ");
  }

  function showHelp() {
    help.replaceChildren(
      el("h2", null, "Keys"),
      table(["key", "does"], KEYS),
      el("form", { method: "dialog" }, el("button", null, "close")),
    );
    help.showModal();
  }

  function switchTheme() {
    const root = document.documentElement;
    const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "") + 1) % THEMES.length];
    setTheme(next);
    try {
      localStorage.setItem("theme", next);
    } catch {
      /* a page from a file may keep nothing */
    }
  }

  function setTheme(theme) {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
  }

  function lost() {
    status.textContent = "the server does not answer; trying again";
    status.classList.add("bad");
    main.dataset.lost = "yes";
    revision = "";
  }

  /** Ask whether something is new. A tab that nobody sees draws nothing, and a server that is away is asked rarely. */
  async function poll() {
    try {
      const found = JSON.stringify(await Source.get("state", {}, AbortSignal.timeout(10000)));
      misses = 0;
      status.classList.remove("bad");
      status.textContent = `live · ${Page.runs.map((run) => run.last_step ?? run.steps.at(-1)?.step ?? 0).join(" · ")}`;
      if (found !== revision && !document.hidden && !Filters.isPending() && !help.open) {
        const isFirst = revision === "";
        revision = found;
        if (!isFirst || main.dataset.lost) await load(true);
        delete main.dataset.lost;
      }
    } catch {
      lost();
      misses += 1;
    }
    clearTimeout(timer);
    timer = setTimeout(poll, document.hidden ? HIDDEN_MS : Math.min(POLL_MS * 2 ** misses, LONGEST_MS));
  }

  function moveFocus(by) {
    const items = [...main.querySelectorAll("[data-item]")];
    const at = items.indexOf(document.activeElement);
    const next = items[at < 0 ? (by > 0 ? 0 : items.length - 1) : Math.min(Math.max(at + by, 0), items.length - 1)];
    next?.focus();
    next?.scrollIntoView({ block: "nearest" });
  }

  const go = (name) => main.querySelector(`[data-go="${name}"]`)?.click();
  const ACTIONS = {
    o: () => {
      location.hash = address("overview");
    },
    r: () => {
      location.hash = address("rollouts", { run: Page.run(readRoute()) });
    },
    c: () => {
      if (Page.runs.length > 1) location.hash = address("compare", { run: 0, other: 1 });
    },
    j: () => moveFocus(1),
    k: () => moveFocus(-1),
    "[": () => go("earlier"),
    "]": () => go("later"),
    p: () => go("before"),
    n: () => go("after"),
    ArrowLeft: () => document.getElementById("previous")?.click(),
    ArrowRight: () => document.getElementById("next")?.click(),
    "/": () => main.querySelector("[name=text]")?.focus(),
    t: switchTheme,
    "?": showHelp,
    Escape: () => history.back(),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    if (event.target.matches?.("input, select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (!Object.hasOwn(ACTIONS, event.key)) return;
    event.preventDefault();
    ACTIONS[event.key]();
  });
  window.addEventListener("hashchange", () => load(false));
  try {
    setTheme(localStorage.getItem("theme") ?? "");
  } catch {
    /* as above */
  }
  load(true).then(() => {
    if (!Source.isLive) return;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) poll();
    });
    poll();
  });
})();
