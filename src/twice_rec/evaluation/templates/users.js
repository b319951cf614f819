"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [browser, find, by, which, list, page, count] = ["browser", "find", "by", "which", "list", "user", "count"]
    .map((id) => document.getElementById(id));
  const labels = new Map(data.variants);
  let shown = [];
  let current = 0;

  // Every text of shops, users and models goes through textContent, so that it can only be text.
  function make(tag, text, kind, ...children) {
    const node = document.createElement(tag);
    if (text !== null && text !== undefined) node.textContent = String(text);
    if (kind) node.className = kind;
    node.append(...children);
    return node;
  }
  const title = (id) => (id in data.items ? data.items[id][0] : id);
  const brand = (id) => (id in data.items ? data.items[id][1] : "");

  function texts(user) {
    const ids = [...user.candidates, ...user.history.map((entry) => entry[0])];
    const said = Object.values(user.answers).map((answer) => answer.rationale || "");
    const reviews = user.history.map((entry) => entry[2]);
    return [user.id, ...ids.map((id) => `${title(id)} ${brand(id)}`), ...reviews, ...said].join("\n").toLowerCase();
  }
  const searched = data.users.map(texts);
  const hits = (user) => user.answers[by.value] && user.answers[by.value].choice === user.target;

  function fits(user, index) {
    if (which.value !== "all" && !(by.value in user.answers)) return false;
    if (which.value === "hit" && !hits(user)) return false;
    if (which.value === "miss" && hits(user)) return false;
    return find.value.toLowerCase().split(/\s+/).every((word) => searched[index].includes(word));
  }

  function badge(isHit) {
    return make("span", null, isHit ? "hit" : "miss", make("span", isHit ? "hit" : "miss", "badge"));
  }

  function refresh() {
    shown = data.users.filter(fits);
    count.textContent = `${shown.length} of ${data.users.length} users`;
    list.replaceChildren(...shown.map((user, index) => {
      const button = make("button", null, "", make("span", user.id));
      button.type = "button";
      if (by.value in user.answers) button.append(badge(hits(user)));
      button.addEventListener("click", () => show(index));
      return make("li", null, "", button);
    }));
    show(0);
  }

  function show(index) {
    current = index;
    const buttons = [...list.querySelectorAll("button")];
    buttons.forEach((button, place) => button.setAttribute("aria-current", String(place === index)));
    page.replaceChildren(...(shown[index] ? pageOf(shown[index]) : [make("p", "No user fits.")]));
  }

  function pageOf(user) {
    const past = user.history.map(([id, rating, review]) => make("li", null, "",
      make("span", title(id)), make("div", [brand(id), rating, review && `“${review}”`].filter(Boolean).join(" · "), "review")));
    const names = data.variants.map(([name]) => name).filter((name) => name in user.answers);
    const first = names.filter(isFirst).map((name) => answerOf(user, name));
    const others = names.filter((name) => !isFirst(name)).map((name) => answerOf(user, name));
    const more = make("details", null, "", make("summary", `${others.length} more variants`), make("div", null, "answers", ...others));
    return [
      make("h3", `User ${user.id}`),
      make("h4", "History, oldest first"), make("ol", null, "", ...past),
      make("h4", "Candidates, as the prompt lists them"), candidatesOf(user),
      make("h4", "What each variant wrote and chose"), make("div", null, "answers", ...first),
      ...(others.length ? [more] : []),
    ];
  }

  // The paper's variants and the chosen one are open, all others folded, unless they are few.
  const papers = ["base", "stage2", "stage3_C", "stage3_D", "stage3"];
  const isFirst = (name) => data.variants.length <= 6 || papers.includes(name) || name === by.value;

  function candidatesOf(user) {
    const head = ["Candidate", ...(user.confidence.length ? ["CF confidence"] : []), "Chosen by"];
    const top = make("tr", null, "", ...head.map((text) => {
      const cell = make("th", text);
      cell.scope = "col";
      return cell;
    }));
    const rows = user.candidates.map((id, place) => {
      const name = make("th", `${place + 1}. ${title(id)}`);
      name.scope = "row";
      if (id === user.target) name.append(" ", make("strong", "(bought next)"));
      const cells = [name];
      if (user.confidence.length) {
        const filled = make("i");
        filled.style.width = `${100 * user.confidence[place]}%`;
        cells.push(make("td", user.confidence[place].toFixed(3), "", make("span", null, "meter", filled)));
      }
      const who = data.variants.filter(([key]) => user.answers[key] && user.answers[key].choice === id);
      const named = who.filter(([key]) => isFirst(key)).map(([, label]) => label);
      const rest = who.length - named.length;
      cells.push(make("td", [...named, ...(rest ? [`${rest} more`] : [])].join("; ")));
      return make("tr", null, id === user.target ? "target" : "", ...cells);
    });
    const box = make("div", null, "scroll", make("table", null, "", make("thead", null, "", top), make("tbody", null, "", ...rows)));
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", "Candidates");
    return box;
  }

  function answerOf(user, name) {
    const answer = user.answers[name];
    const parts = [
      make("h5", null, "", make("span", labels.get(name)), badge(answer.choice === user.target)),
      make("p", null, "", make("strong", "Chooses: "), title(answer.choice), ` (target on rank ${answer.rank})`),
    ];
    if (answer.rationale) parts.push(make("blockquote", answer.rationale));
    if (answer.named !== undefined && answer.named !== answer.choice) {
      const what = answer.named === null ? "no single item" : title(answer.named);
      parts.push(make("p", `The completion itself names ${what}; the ranking chooses another.`, "review"));
    }
    if (answer.of > 1) parts.push(make("p", `One of ${answer.of} completions.`, "review"));
    if (answer.earned) {
      const sum = data.rewards.map(([reward, weight], place) => `${weight} × ${answer.earned[place]} (${reward.replaceAll("_", " ")})`);
      parts.push(make("p", null, "", make("strong", "Reward: "), `${sum.join(" + ")} = ${answer.total}`));
    }
    for (const [judge, verdict] of answer.judged || []) {
      parts.push(make("p", null, "", make("strong", `Judge ${judge}: `), verdict));
    }
    return make("section", null, "answer", ...parts);
  }

  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = Math.min(shown.length - 1, Math.max(0, current + step));
    show(next);
    list.querySelectorAll("button")[next].focus();
  });
  browser.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  for (const [name, label] of data.variants) {
    const option = make("option", label);
    option.value = name;
    by.append(option);
  }
  by.value = labels.has("stage3") ? "stage3" : data.variants.length ? data.variants[data.variants.length - 1][0] : "";
  find.addEventListener("input", refresh);
  by.addEventListener("change", refresh);
  which.addEventListener("change", refresh);
  browser.hidden = false;
  refresh();
})();
