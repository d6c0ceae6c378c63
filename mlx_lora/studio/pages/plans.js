// Plans of models from their configuration alone: two at a time, each asked once per choice of settings.
import { planModel } from "./api.js";

const MOST = 200; // plans kept; the oldest leave
const known = new Map();
const queue = [];
let asking = 0;

function next() {
  while (asking < 2 && queue.length) {
    const { key, model, settings, done } = queue.shift();
    asking += 1;
    planModel(model, settings)
      .then(
        (plan) => ({ plan }),
        (error) => ({ problem: error.message }),
      )
      .then((answer) => {
        known.set(key, answer);
        if (known.size > MOST) known.delete(known.keys().next().value);
        asking -= 1;
        done(answer);
        next();
      });
  }
}

// Call `done` with {plan} or {problem}, now when it is known. Returns a function that takes the question back.
export function askPlan(model, settings, done) {
  const key = JSON.stringify([model, settings]);
  if (known.has(key)) {
    done(known.get(key));
    return () => {};
  }
  const question = { key, model, settings, done };
  queue.push(question);
  next();
  return () => {
    question.done = () => {};
    if (queue.includes(question)) queue.splice(queue.indexOf(question), 1);
  };
}
