"use strict";
// Where the data come from: the server, or the page itself when it was written by --export.

const Source = (() => {
  const holder = document.getElementById("data");
  const embedded = holder ? JSON.parse(holder.textContent) : null;

  async function get(name, parameters = {}, signal = undefined) {
    if (embedded) return fromPage(name, parameters);
    const query = new URLSearchParams(parameters).toString();
    let response, answer;
    try {
      response = await fetch(`api/${name}${query ? `?${query}` : ""}`, { signal });
      answer = await response.json();
    } catch (error) {
      if (error.name !== "AbortError") error.isLost = true;
      throw error;
    }
    if (!response.ok) throw new Error(answer.error ?? `the server answers ${response.status}`);
    return answer;
  }

  /** The answer that the server gave when the page was written, narrowed by kind, step and prompt. */
  function fromPage(name, parameters) {
    const run = Number(parameters.run ?? 0);
    const groups = (number) =>
      embedded.groups[number].filter(
        (group) =>
          (!parameters.kind || group.kind === parameters.kind) &&
          (!parameters.step || group.step === Number(parameters.step)) &&
          (!parameters.uid || group.uid === parameters.uid),
      );
    const cut = (list) =>
      list.slice(Number(parameters.offset ?? 0), Number(parameters.offset ?? 0) + Number(parameters.limit ?? 10));
    if (name === "runs") return embedded.runs;
    if (name === "state") return embedded.runs.map((one) => one.revision);
    if (name === "metrics" || name === "checks") return embedded[name][run];
    if (name === "rollout") {
      const { kind, step, group, sample } = parameters;
      const found = embedded.rollouts[[run, kind, step, group, sample].join("/")];
      if (!found) throw new Error("this page does not hold that rollout");
      return found;
    }
    if (name === "compare") {
      const other = new Map(groups(Number(parameters.other)).map((group) => [group.uid, group]));
      const pairs = groups(run)
        .filter((group) => other.has(group.uid))
        .map((group) => [group, other.get(group.uid)]);
      return {
        total: pairs.length,
        offset: Number(parameters.offset ?? 0),
        prompts: [groups(run).length, other.size],
        pairs: cut(pairs),
      };
    }
    const found = groups(run);
    const rollouts = found.reduce((sum, group) => sum + group.samples.filter((sample) => sample.passes).length, 0);
    if (name === "prompt") return { uid: parameters.uid, total: found.length, groups: found };
    return { rollouts, total: found.length, offset: Number(parameters.offset ?? 0), groups: cut(found) };
  }

  /** The address of an image, at most `side` pixels long. */
  function image(run, id, side) {
    if (!/^[0-9a-f]{64}$/.test(id)) return "";
    return embedded ? (embedded.images[id] ?? "") : `image/${run}/${id}?side=${side}`;
  }

  return { get, image, isLive: !embedded };
})();
